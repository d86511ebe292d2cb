"""The command as people type it: the forms that must work, exit codes, and one line for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inlay.cli.app import run
from inlay.cli.verbs import VERBS
from inlay.engine.registry import kinds


def call(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `inlay` in a process of its own, with warnings as errors."""
    command = [sys.executable, "-W", "error", "-m", "inlay.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=cwd, env={**os.environ}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Path) -> Path:
    """A run made by the documented command line, in a process of its own."""
    folder = tmp_path_factory.mktemp("cli")
    done = call(
        "train", "--model", str(tiny_model), "--task", "text-classification", "--train", str(rows / "train.jsonl"),
        "--validation", str(rows / "validation.jsonl"), "--method", "lora", "--out", "run", "--max-length", "16",
        "--set", "method.r=4", "--set", "train.learning_rate=1e-2", "--set", "train.max_steps=4", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "folder      " + str(folder / "run") in done.stdout
    assert "step 4/4 (100%)" in done.stderr
    assert "guessed; change with --columns text=…,label=…" in done.stderr
    return folder / "run"


def test_train_leaves_what_the_flags_said(finished: Path) -> None:
    record = json.loads((finished / "record.json").read_text())
    assert record["method"] == {"kind": "lora", "r": 4}
    assert record["steps"] == 4
    assert "learning_rate: 0.01" in (finished / "run.yaml").read_text()


def test_a_yaml_file_trains_too(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = finished.parent / "other"
    assert (
        run(["train", str(finished / "run.yaml"), "--out", str(other), "--columns", "text=text,label=label"], False)
        == 0
    )
    first, second = (json.loads((folder / "record.json").read_text())["metrics"] for folder in (finished, other))
    assert first == second


def test_evaluate_prints_json_and_nothing_else(finished: Path, rows: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(finished), "--data", str(rows / "validation.jsonl"), "--json"], False) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == pytest.approx(
        json.loads((finished / "record.json").read_text())["metrics"]["validation"], abs=1e-6
    )
    assert captured.err == ""


def test_predict_writes_a_file_or_prints(
    finished: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictions.jsonl"
    data = str(rows / "test.jsonl")
    assert run(["predict", str(finished), "--data", data, "--out", str(out)], False) == 0
    assert f"12 predictions in {out}" in capsys.readouterr().out
    assert run(["predict", str(finished), "--data", data], False) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [json.loads(line) for line in out.read_text().splitlines()]


def test_merge_says_how_far_off_it_is(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", str(finished), "--out", str(tmp_path / "merged")], False) == 0
    assert "differ by at most" in capsys.readouterr().out
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_the_list_of_methods_counts_in_a_model(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    width = json.loads((tiny_model / "config.json").read_text())["hidden_size"]
    assert run(["methods", "--model", str(tiny_model), "--json"], False) == 0
    found = {row["kind"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(found) == kinds()
    assert found["lora"]["parameters"] == 2 * 2 * 8 * (width + width)  # 2 blocks, query and value, r = 8
    assert found["lora"]["what"].startswith("y = W x + s · B (A x)")
    assert found["vl_pet"]["parameters"] is None
    assert "encoder–decoder" in found["vl_pet"]["uncounted"]
    assert run(["methods", "lora", "--model", str(tiny_model)], False) == 0
    assert f"{32 * 2 * width:,} parameters" in capsys.readouterr().out


def test_check_show_methods_and_convert_print(
    finished: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", str(finished / "run.yaml")], False) == 0
    assert "bert.encoder.layer.{0-1}.attention.self.query" in capsys.readouterr().out
    assert run(["show", str(finished)], False) == 0
    assert "read by     Inlay and HF peft (LORA)" in capsys.readouterr().out
    assert run(["show", str(tiny_model), "--json"], False) == 0
    assert any(place["pattern"].endswith("self.query") for place in json.loads(capsys.readouterr().out))
    assert run(["methods"], False) == 0
    assert "lora " in capsys.readouterr().out
    assert run(["methods", "lora"], False) == 0
    assert "    r = 8" in capsys.readouterr().out
    assert run(["convert", str(finished), "--out", str(tmp_path / "converted")], False) == 0
    assert "read by Inlay and HF peft (LORA)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "there is no verb 'trian'; did you mean 'train' or 'trim'?"),
        (["train", "--modle", "m"], "inlay train has no option --modle; did you mean '--model'"),
        (["train", "--model"], "--model"),
        (["train", "--train", "a.jsonl"], "names no model"),
        (["train", "rum.yaml"], "there is no file 'rum.yaml'"),
        (["train", "--model", "m", "--method", "lorra"], "there is no method 'lorra'; did you mean 'lora'"),
        (
            ["train", "--model", "m", "--set", "train.learning_rat=1"],
            "train has no setting 'learning_rat'; did you mean",
        ),
        (["train", "--model", "m", "--set", "metod.r=1"], "has no setting 'metod'; did you mean 'method'"),
        (["train", "--model", "m", "--columns", "text"], "--columns takes ROLE=COLUMN"),
        (["train", "--model", "m", "--out", "nowhere", "--resume"], "there is no run in nowhere to resume"),
        (["evaluate", "nowhere"], "nowhere is not the folder of a run (it does not exist"),
        (["evaluate", "nowhere", "--batch-size", "0"], "batch-size"),
        (["predict", "nowhere"], "--data"),
        (["methods", "lorra"], "did you mean 'lora'"),
        (["convert", "nowhere", "--out", "x"], "there is no folder nowhere"),
        (["show", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments, False) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("inlay: ")
    assert len(captured.err.splitlines()) == 1
    assert says in captured.err
    assert not list(tmp_path.iterdir())


def test_debug_shows_where_it_came_from_wherever_it_stands() -> None:
    done = call("train", "nowhere.yaml", "--debug")
    assert "Traceback" in done.stderr
    assert done.returncode != 0
    done = call("train", "nowhere.yaml")
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_every_verb_has_help_and_a_library_call_of_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    import inlay.fewshot
    import inlay.train

    for verb in VERBS:
        assert run([verb.__name__, "--help"], False) == 0
        assert (verb.__doc__ or "").split()[0] in capsys.readouterr().out
        room = inlay.fewshot if verb.__module__.endswith("fewshot") else inlay.train
        assert callable(getattr(room, verb.__name__))


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_the_verbs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments, False) == 0
    out = capsys.readouterr().out
    assert all(verb.__name__ in out for verb in VERBS)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], False) == 0
    assert capsys.readouterr().out.startswith("inlay ")


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(
    tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal\n"
        "from inlay.train.callbacks import Curve\n"
        "from inlay.cli.app import run\n"
        "step = Curve.on_step_end\n"
        "def on_step_end(self, args, state, control, **around):\n"
        "    step(self, args, state, control, **around)\n"
        "    if state.global_step == 3: os.kill(os.getpid(), signal.SIGINT)\n"
        "Curve.on_step_end = on_step_end\n"
        f"raise SystemExit(run(['train', '--model', {str(tiny_model)!r}, '--data', {str(rows)!r}, '--max-length', '16',"
        " '--out', 'r', '--set', 'train.num_train_epochs=3', '--set', 'train.per_device_train_batch_size=8'], False))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == (
        "inlay: stopped at step 3 of 15, with a checkpoint; go on with: inlay train --resume --out r"
    )
    monkeypatch.chdir(tmp_path)
    assert run(["train", "--resume", "--out", "r"], False) == 0
    assert json.loads((tmp_path / "r" / "record.json").read_text())["steps"] == 15
