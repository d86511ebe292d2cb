"""Whole few-shot runs on a tiny model: measured, resumed to the same bits, used afterwards, refused where need be."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from inlay.cli import app
from inlay.errors import CheckpointError, ConfigError, DataError, InlayError, TrainingError
from inlay.fewshot import FewShotRun, evaluate, explain, fewshot, predict
from inlay.fewshot.agreement import agreement, agreement_of_run
from inlay.fewshot.problem import Problem
from inlay.fewshot.running import _split, prepare

ROWS = [
    {"text": f"the film was {'really ' * (number % 3)}{word}", "label": label}
    for number in range(6)
    for word, label in (("great", "pos"), ("terrible", "neg"))
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """train, test and unlabelled rows."""
    for name in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    words = "".join(json.dumps({"text": row["text"]}) + "\n" for row in ROWS)
    (tmp_path / "unlabelled.jsonl").write_text(words, encoding="utf-8")
    return tmp_path


@pytest.fixture
def make(data: Path, bert_folder: Path) -> Callable[..., FewShotRun]:
    """A small run with some settings changed."""

    def made(**changes: Any) -> FewShotRun:
        settings: dict[str, Any] = {
            "train": str(data / "train.jsonl"),
            "test": str(data / "test.jsonl"),
            "model": str(bert_folder),
            "templates": ["{text} it was {mask}."],
            "verbalizer": {"neg": "bad", "pos": "good"},
            "shots": 2,
            "seeds": [1, 2],
            "recipe": {"steps": 4, "batch_size": 2},
            "max_length": 32,
            "out": str(data / "out"),
        }
        return FewShotRun.from_settings({**settings, **changes})

    return made


def quiet(line: str) -> None:
    """Progress, unheard."""


def weights(run: FewShotRun) -> dict[str, Any]:
    """Every adapter of a run."""
    return {
        str(path.relative_to(run.out)): load_file(path)
        for path in sorted(Path(run.out).rglob("adapter_model.safetensors"))
    }


@pytest.mark.parametrize("kind", ["standard", "prompt"])
def test_a_run_is_measured_and_can_be_used(kind: str, make: Callable[..., FewShotRun], data: Path) -> None:
    run = make(method=kind)
    report = fewshot(run, say=quiet)
    points = [result.test["accuracy"] for result in report.seeds]
    assert report.mean["accuracy"] == pytest.approx(sum(points) / 2)
    assert report.deviation["accuracy"] == pytest.approx(abs(points[0] - points[1]) / 2**0.5)
    stored = json.loads((data / "out" / "record.json").read_text(encoding="utf-8"))
    assert stored["mean"] == report.mean
    assert stored["seeds"][0]["split"]["digest"] != stored["seeds"][1]["split"]["digest"]
    assert [result.adapters for result in report.seeds] == [1, 1]
    assert all(result.flops > 0 and result.tokens > 0 for result in report.seeds)
    for seed, point in zip(run.seeds, points, strict=True):
        assert evaluate(run.out, seed=seed)["accuracy"] == pytest.approx(point)
    predictions = predict(run.out, str(data / "unlabelled.jsonl"), data / "found.jsonl")
    assert len(predictions) == len(ROWS)
    assert (data / "found.jsonl").read_text(encoding="utf-8").count("\n") == len(ROWS)
    texts = predict(run.out, [row["text"] for row in ROWS])
    assert [row["prediction"] for row in texts] == [row["prediction"] for row in predictions]
    assert sum(predictions[0]["scores"].values()) == pytest.approx(1)


def test_from_python_a_run_is_silent_unless_asked(
    make: Callable[..., FewShotRun], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(seeds=[1])
    fewshot(run)
    assert capsys.readouterr() == ("", "")
    fewshot(run, overwrite=True, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[:2] == ["seed 1 (1 of 1)", "  pattern-0"]


def test_explain_shows_the_prompt_and_the_words(make: Callable[..., FewShotRun]) -> None:
    run = make(seeds=[1])
    fewshot(run, say=quiet)
    (found,) = explain(run.out, ["the film"], top=3)
    assert "[MASK]" in found.prompt
    assert "the film" in found.prompt
    assert len(found.words) == 1
    assert len(found.words[0]) == 3
    assert found.scores[found.label] == max(found.scores.values())


def test_a_stopped_run_goes_on_and_is_the_same_run(make: Callable[..., FewShotRun], data: Path) -> None:
    whole = make(out=str(data / "whole"))
    fewshot(whole, say=quiet)
    heard: list[str] = []

    class Stopped(Exception):
        pass

    def stop(line: str) -> None:
        heard.append(line)
        if line.startswith("seed 2"):
            raise Stopped

    run = make()
    with pytest.raises(Stopped):
        fewshot(run, say=stop)
    with pytest.raises(ConfigError, match="--resume"):
        fewshot(run, say=quiet)
    heard.clear()
    report = fewshot(run, resume=True, say=heard.append)
    assert sum("pattern-0" in line for line in heard) == 1  # the first seed's is not done again
    first, second = weights(whole), weights(run)
    assert first.keys() == second.keys()
    assert all((first[path][name] == second[path][name]).all() for path in first for name in first[path])
    assert len(report.seeds) == 2


def test_a_changed_run_is_not_resumed(make: Callable[..., FewShotRun]) -> None:
    run = make(seeds=[1])
    with pytest.raises(TrainingError, match="no few-shot run"):
        fewshot(run, resume=True, say=quiet)
    fewshot(run, say=quiet)
    with pytest.raises(ConfigError, match="recipe"):
        fewshot(dataclasses.replace(run, recipe={"steps": 5}), resume=True, say=quiet)
    fewshot(dataclasses.replace(run, recipe={"steps": 5}), overwrite=True, say=quiet)


def test_more_seeds_can_be_added_to_a_finished_run(make: Callable[..., FewShotRun]) -> None:
    run = make(seeds=[1])
    one = fewshot(run, say=quiet)
    two = fewshot(dataclasses.replace(run, seeds=(1, 2)), resume=True, say=quiet)
    assert two.seeds[0].test == one.seeds[0].test
    assert len(two.seeds) == 2


def test_unlabelled_rows_are_hidden_labels_where_none_are_given(
    make: Callable[..., FewShotRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    from inlay.fewshot.systems.prompt import Prompt

    seen: list[Problem] = []
    solve = Prompt.solve

    def look(self: Prompt, problem: Problem, stages: Any) -> Any:
        seen.append(problem)
        return solve(self, problem, stages)

    monkeypatch.setattr(Prompt, "solve", look)
    fewshot(make(seeds=[1]), say=quiet)
    assert len(seen[0].unlabelled) == len(ROWS) - 4
    assert all("label" not in row for row in seen[0].unlabelled)


def test_words_can_be_found(make: Callable[..., FewShotRun], data: Path) -> None:
    run = make(find_words=2, verbalizer={}, seeds=[1])
    (result,) = fewshot(run, say=quiet).seeds
    assert result.words is not None
    assert set(result.words) == {"neg", "pos"}
    assert all(len(words) == 2 for words in result.words.values())
    assert not set(result.words["neg"]) & set(result.words["pos"])
    first, again = predict(run.out, [ROWS[0]]), fewshot(run, resume=True, say=quiet).seeds[0].words
    assert set(first[0]["scores"]) == {"neg", "pos"}
    assert again == result.words


def test_without_shots_it_is_zero_shot(make: Callable[..., FewShotRun]) -> None:
    (result,) = fewshot(make(shots=0, seeds=[1], recipe={"steps": 0}), say=quiet).seeds
    assert result.split["train"] == []
    with pytest.raises(ConfigError, match="no rows to train on"):
        fewshot(make(shots=0, seeds=[1]), overwrite=True, say=quiet)


BAD: list[tuple[dict[str, Any], type[InlayError], str]] = [
    ({"method": "pett"}, ConfigError, "did you mean 'pet'"),
    ({"method": {"kind": "prompt", "colour": 1}}, ConfigError, "no setting 'colour'"),
    ({"templates": []}, ConfigError, "there are none: give --template"),
    ({"templates": ["{text} is fine"]}, ConfigError, "has no {mask}"),
    ({"templates": ["It was {mask}."]}, ConfigError, "shows nothing of an example"),
    ({"templates": ["{txt} {mask}"]}, DataError, "did you mean 'text'"),
    ({"verbalizer": {"neg": "bad"}}, ConfigError, "the label 'pos' has no word"),
    ({"verbalizer": {"neg": "bad", "pos": "good", "new": "news"}}, ConfigError, "no label of the data"),
    ({"verbalizer": {"neg": "bad", "pos": "goodness"}}, ConfigError, "'goodness' .* is \\d tokens"),
    ({"verbalizer": {"neg": "bad", "pos": "bad"}}, ConfigError, "stands for both"),
    ({"shots": 50}, DataError, "50 rows of each label"),
    ({"recipe": {"step": 3}}, ConfigError, "no setting 'step'.*; it has: steps, batch_size"),
    ({"label": "y"}, DataError, "no column 'y'"),
    ({"peft": ["lorra"]}, InlayError, "lorra"),
]


@pytest.mark.parametrize(("changes", "error", "says"), BAD)
def test_bad_input_is_one_error_and_leaves_nothing(
    changes: dict[str, Any], error: type[InlayError], says: str, make: Callable[..., FewShotRun], data: Path
) -> None:
    with pytest.raises(error, match=says.replace("{", r"\{") if "\\d" not in says else says):
        fewshot(make(**changes), say=quiet)
    assert not (data / "out").exists()


def test_a_run_that_cannot_start_leaves_nothing_and_takes_nothing_away(
    make: Callable[..., FewShotRun], data: Path
) -> None:
    run = make(seeds=[1], recipe={"steps": 1}, baseline=False)
    before = fewshot(run).mean
    with pytest.raises(ConfigError, match=r"has no \{mask\}"):
        fewshot(dataclasses.replace(run, templates=("{text} is fine",)), overwrite=True)
    assert evaluate(run.out) == before  # what was to be replaced is still there
    too_few = make(method="ipet", shots=0, unlabelled=str(data / "unlabelled.jsonl"), out=str(data / "ipet"))
    with pytest.raises(ConfigError, match=r"need 5000 .* there are 12: .*--set unlabelled_rows=5000"):
        fewshot(too_few)  # which shows when its rows are there
    assert not (data / "ipet").exists()


def test_what_was_finished_before_an_error_stays(
    make: Callable[..., FewShotRun], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inlay.fewshot.predictor import Solution

    def fail(*_: Any, **__: Any) -> None:
        raise DataError("no")

    monkeypatch.setattr(Solution, "scores", fail)
    with pytest.raises(DataError):
        fewshot(make(seeds=[1], recipe={"steps": 1}))
    assert list((data / "out").rglob("adapter_model.safetensors"))


def test_the_column_of_labels_is_asked_for_by_its_flag(make: Callable[..., FewShotRun], data: Path) -> None:
    rows = "".join(json.dumps({"text": row["text"], "code": row["label"]}) + "\n" for row in ROWS)
    (data / "codes.jsonl").write_text(rows, encoding="utf-8")
    with pytest.raises(DataError, match=r"which column is the label\? It has: text, code. Say it with --label COLUMN"):
        fewshot(make(train=str(data / "codes.jsonl")))


def grouped(data: Path) -> dict[str, Any]:
    """Settings of a run whose rows belong to articles, the test rows' first two to the training rows' as well."""
    for name, start in (("train", 0), ("test", 100), ("unlabelled", 4)):
        rows = [{**row, "article": start + number // 2} for number, row in enumerate(ROWS)]
        if name == "test":
            rows[0]["article"] = "1"  # the same article, whatever its number is written as
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}_grouped.jsonl").write_text(lines.replace(': "1"}', ": 1}"), encoding="utf-8")
    files = {name: str(data / f"{name}_grouped.jsonl") for name in ("train", "test")}
    return {**files, "group_column": "article", "shots": 1, "dev": 1, "seeds": [1]}


def test_rows_of_a_group_are_on_one_side(make: Callable[..., FewShotRun], data: Path) -> None:
    for seed in range(4):
        run = make(**grouped(data), unlabelled=str(data / "unlabelled_grouped.jsonl"))
        ready = prepare(run)
        split = _split(ready, seed)
        assert ready.groups is not None
        sides = [{ready.groups.train[index] for index in part} for part in (split.train, split.dev)]
        assert not sides[0] & sides[1]
        assert "1" not in sides[0] | sides[1]  # a test row's
        unlabelled = {row["article"] for row in ready.problem(split, seed).unlabelled}
        assert unlabelled == {4, 5, 6, 7, 8, 9} - {int(group) for group in sides[1]}
    split = _split(prepare(make(**{**grouped(data), "shots": None, "dev": None})), 0)
    assert sorted(split.train) == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11]
    split = _split(prepare(make(**{**grouped(data), "shots": 0, "recipe": {"steps": 0}})), 0)
    assert split.rest == (0, 1, 4, 5, 6, 7, 8, 9, 10, 11)


def test_groups_are_in_the_report(make: Callable[..., FewShotRun], data: Path) -> None:
    report = fewshot(make(**grouped(data), recipe={"steps": 1}))
    stored = json.loads((data / "out" / "record.json").read_text(encoding="utf-8"))
    (one,) = stored["seeds"]
    assert stored["run"]["group_column"] == one["split"]["groups"]["column"] == "article"
    assert one["split"]["groups"]["train"] == sorted({str(index // 2) for index in one["split"]["train"]})
    assert one["split"]["groups"]["test"] == 7
    assert re.search(
        r"^groups       by article: \d in train, \d in dev, 7 in test, none on two sides", str(report), re.M
    )


def test_groups_that_cannot_be_kept_apart_are_one_error(make: Callable[..., FewShotRun], data: Path) -> None:
    settings = grouped(data)
    with pytest.raises(DataError, match=r"train_grouped.jsonl has no column 'articel' .*did you mean 'article'"):
        fewshot(make(**{**settings, "group_column": "articel"}))
    with pytest.raises(DataError, match=r"test.jsonl has no column 'article'"):
        fewshot(make(**{**settings, "test": str(data / "test.jsonl")}))
    with pytest.raises(ConfigError, match="training rows alone: give --test FILE"):
        fewshot(make(**{**settings, "test": None, "dev": None}))
    with pytest.raises(DataError, match="'neg' has 0 left of groups that are on no other side"):
        fewshot(make(**{**settings, "shots": 5, "dev": 1}))
    with pytest.raises(DataError, match="nothing is left to draw"):
        fewshot(make(**{**settings, "test": settings["train"]}))
    (data / "gap.jsonl").write_text('{"text": "a", "label": "neg"}\n' + Path(settings["train"]).read_text(), "utf-8")
    with pytest.raises(DataError, match=r"gap.jsonl line 1 has no 'article'"):
        fewshot(make(**{**settings, "train": str(data / "gap.jsonl")}))
    assert not (data / "out").exists()


def test_the_command_takes_a_column_of_groups(
    make: Callable[..., FewShotRun], data: Path, bert_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(**grouped(data))
    (data / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
    assert FewShotRun.from_yaml(data / "run.yaml").group_column == "article"
    assert app.run(["fewshot", str(data / "run.yaml"), "--group-column", "writer"], debug=False) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no column 'writer' to group rows by" in line
    assert not Path(run.out).exists()


def test_seeds_are_compared(make: Callable[..., FewShotRun], data: Path) -> None:
    run = make(recipe={"steps": 1}, baseline=False)
    report = fewshot(run)
    stored = json.loads((data / "out" / "record.json").read_text(encoding="utf-8"))
    assert report.agreement == stored["agreement"] == agreement_of_run(run.out).to_dict()
    told = [[row["prediction"] for row in predict(run.out, run.test, seed=seed)] for seed in run.seeds]
    assert stored["agreement"] == agreement(told).to_dict()
    assert stored["agreement"]["rows"] == len(ROWS)
    assert "agreement    Krippendorff's α " in str(report)
    picture = (data / "out" / "seeds.svg").read_text(encoding="utf-8")
    assert all(f"seed {one.seed}: {one.test['accuracy']:.4f}" in picture for one in report.seeds)
    assert "(seeds.svg)" in (data / "out" / "README.md").read_text(encoding="utf-8")
    rows = "".join(json.dumps({"text": row["text"]}) + "\n" for row in ROWS)
    (data / "bare.jsonl").write_text(rows, encoding="utf-8")  # how far seeds agree needs no labels
    bare = fewshot(make(test=str(data / "bare.jsonl"), recipe={"steps": 1}, out=str(data / "bare")))
    assert bare.agreement == report.agreement
    assert bare.mean == {}
    assert not (data / "bare" / "seeds.svg").exists()


def test_one_seed_is_compared_with_nothing(make: Callable[..., FewShotRun], data: Path) -> None:
    report = fewshot(make(seeds=[1], recipe={"steps": 1}, baseline=False))
    assert report.agreement is None
    assert "agreement" not in str(report)
    assert not (data / "out" / "seeds.svg").exists()


def test_labels_that_differ_between_files_are_one_error(make: Callable[..., FewShotRun], data: Path) -> None:
    (data / "other.jsonl").write_text('{"text": "a film", "label": "positive"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="the test label 'positive' is not one"):
        fewshot(make(test=str(data / "other.jsonl")), say=quiet)


def test_an_empty_unlabelled_file_is_one_error(make: Callable[..., FewShotRun], data: Path) -> None:
    (data / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        fewshot(make(unlabelled=str(data / "empty.jsonl")), say=quiet)


def test_a_long_text_is_cut_as_the_template_allows(make: Callable[..., FewShotRun], data: Path) -> None:
    rows = [{**row, "text": row["text"] + " really" * 500} for row in ROWS]
    (data / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fewshot(make(train=str(data / "long.jsonl"), seeds=[1]), say=quiet)
    with pytest.raises(ConfigError, match="max_length"):
        fewshot(make(templates=["{text:keep} {mask}"], train=str(data / "long.jsonl")), overwrite=True, say=quiet)


def test_the_command_runs_predicts_and_explains(
    make: Callable[..., FewShotRun], data: Path, bert_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(data / "cli")
    arguments = [
        "fewshot", "--method", "prompt", "--model", str(bert_folder), "--train", str(data / "train.jsonl"),
        "--test", str(data / "test.jsonl"), "--template", "{text} it was {mask}.", "--verbalizer", "neg=bad",
        "pos=good",
        "--set", "recipe.batch_size=3", "recipe.warmup=0.5", "unlabelled_rows=5",
        "--shots", "2", "--seeds", "2", "--steps", "2", "--max-length", "32", "--out", out,
    ]  # fmt: skip
    assert app.run(arguments, debug=True) == 0
    made = FewShotRun.from_yaml(Path(out) / "fewshot.yaml")
    assert made.recipe == {"batch_size": 3, "warmup": 0.5, "steps": 2}
    assert made.unlabelled_rows == 5
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert f"next         inlay predict {out} --data FILE" in printed
    assert app.run(["explain", out, "the film was great"], debug=True) == 0
    assert "[MASK]" in capsys.readouterr().out
    assert app.run(["predict", out, "--data", str(data / "unlabelled.jsonl")], debug=True) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS)
    figures = []
    for more in ([], ["--seed", "21"], ["--data", str(data), "--split", "train"]):
        assert app.run(["evaluate", out, "--json", *more], debug=True) == 0
        figures.append(json.loads(capsys.readouterr().out))
    record = json.loads((Path(out) / "record.json").read_text(encoding="utf-8"))
    assert figures[:2] == [one["test"] for one in record["seeds"]]
    assert "accuracy" in figures[2]
    wrong = {
        "--seed 5": "it has 13, 21",
        "--split validation": "no validation rows",
        "--adapters a=b": "--adapters is for runs of `inlay train`",
        "--task-id a": "--task-id is for runs of `inlay train`",
    }
    for flags, says in wrong.items():
        assert app.run(["evaluate", out, *flags.split()], debug=False) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert app.run([*arguments[:-1], str(data / "cli"), "--resume"], debug=True) == 0
    assert app.run([*arguments[:-1], out], debug=False) == 2
    assert "--resume" in capsys.readouterr().err


def test_other_folders_are_no_few_shot_runs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the folder of a few-shot run"):
        predict(tmp_path, ["a film"])
