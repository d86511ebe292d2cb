"""Each row of docs/errors.md is tried out, and its message compared."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from docs.places import DOCS, tables
from safetensors.torch import load_file, save_file

import inlay
from inlay import errors
from inlay.cli import app
from inlay.tasks.data import read_splits
from inlay.tasks.task import make_task

GIVEN = [table[1:] for table in tables(DOCS / "errors.md") if table[0] == ["Given", "Message", "Fix"]]
ROWS = [pytest.param(*row, id=re.sub(r"[^\w]+", "-", row[0].partition(": `")[0])) for table in GIVEN for row in table]
TENSOR = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"

FILES: dict[str, str | bytes] = {
    "empty.jsonl": "",
    "cut.jsonl": '{"text": "good", "label": "a"}\n{"text": "bad", "la',
    "null.jsonl": '{"text": "good", "label": "a"}\n{"text": null, "label": "b"}\n',
    "comma.csv": "text,label\ngood,a\nbad, really,b\n",
    "latin.jsonl": '{"text": "café", "label": "a"}\n'.encode("latin-1"),
    "rows.pkl": "",
    "two.jsonl": '{"text": "good", "label": "a"}\n{"text": "bad", "label": "b"}\n',
    "other-label.jsonl": '{"text": "so", "label": "c"}\n',
    "one-label.jsonl": '{"text": "good", "label": "a"}\n{"text": "bad", "label": "a"}\n',
    "misspelt.yaml": "modle: base/tiny-bert\ndata: rows\n",
    "cut.yaml": "model: base/tiny-bert\ndata: [\n",
}


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        path.unlink()  # safetensors maps the file that it reads
        save_file(tensors, path)

    return edit


def as_peft(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """As if HF peft had written the config: without Inlay's entry."""

    def change(config: dict[str, Any]) -> None:
        del config["auto_mapping"]
        config.update(fields)

    return change


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "good": lambda folder: None,
    "cut": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()[:-100]
    ),
    "torn-config": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": '),
    "pickle": lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
    "unknown-kind": edit_config(as_peft(peft_type="LORRA")),
    "peft-pissa": edit_config(as_peft(init_lora_weights="pissa")),
    "edited": edit_config(lambda config: config.update(r=4)),
    "later": edit_config(lambda config: config["auto_mapping"]["inlay"].update(format=9)),
    "other-shape": edit_tensors(lambda tensors: tensors.update({TENSOR: torch.zeros(4, 16)})),
    "missing-tensor": edit_tensors(lambda tensors: tensors.pop(TENSOR)),
    "left-over": edit_tensors(lambda tensors: tensors.update({f"{TENSOR}x": torch.zeros(2, 16)})),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Path) -> Path:
    """A folder with everything that the examples name."""
    folder = tmp_path_factory.mktemp("errors")
    shutil.copytree(tiny_model, folder / "base" / "tiny-bert")
    shutil.copytree(rows, folder / "rows")
    for name, content in FILES.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "runs" / "done").mkdir(parents=True)
    (folder / "runs" / "done" / "run.yaml").write_text("model: base/tiny-bert\ndata: rows\n", encoding="utf-8")
    (folder / "runs" / "done" / "record.json").write_text("{}", encoding="utf-8")
    inlay.save(inlay.attach(classifier(folder), inlay.LoRA(r=2)), folder / "adapters" / "good")
    for name, damage in DAMAGE.items():
        if name != "good":
            shutil.copytree(folder / "adapters" / "good", folder / "adapters" / name)
        damage(folder / "adapters" / name)
    return folder


def classifier(folder: Path, **changes: int) -> Any:
    task = make_task("text-classification").resolve(read_splits(folder / "rows"))
    torch.manual_seed(0)
    model = task.load_model(folder / "base" / "tiny-bert")
    return type(model)(type(model.config)(**{**model.config.to_dict(), **changes})) if changes else model


def message_of(given: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the example in a cell (its last piece of code) gets, as a user sees it."""
    example = re.findall(r"`([^`]+)`", given)[-1]
    if example.startswith(("--", "inlay ")):
        line = f"inlay check --model base/tiny-bert --data rows {example}" if example.startswith("--") else example
        assert app.run(shlex.split(line)[1:], debug=False) == 2
        text = capsys.readouterr().err.splitlines()[-1]
        assert text.startswith("inlay: ")
        return text.removeprefix("inlay: ")
    model = classifier(folder)
    scope = {"inlay": inlay, "torch": torch, "model": model}
    if "deeper" in example:
        scope["deeper"] = classifier(folder, num_hidden_layers=3)
    if re.search(r"adapted|merged", example):
        scope["adapted"] = scope["merged"] = inlay.attach(model, inlay.LoRA(r=2))
    if "(merged" in example:
        inlay.merge(model)
    with pytest.raises(inlay.InlayError) as caught:
        eval(example, scope)
    return str(caught.value)


@pytest.mark.parametrize(("given", "message", "fix"), ROWS)
def test_message(
    given: str,
    message: str,
    fix: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    found = message_of(given, place, capsys)
    pattern = ".*".join(re.escape(part) for part in message.strip("`").split("…"))
    assert re.fullmatch(pattern, found), f"{found}\n  is not\n{message}"
    assert fix
    assert "\n" not in found
    if "runs/nan" not in given:  # a run that stopped keeps what it has
        assert sorted(place.rglob("*")) == before


def test_the_classes_are_those_of_the_tree() -> None:
    (table,) = (table[1:] for table in tables(DOCS / "errors.md") if table[0][0] == "Class")
    classes = (found for found in vars(errors).values() if isinstance(found, type))
    own = [found.__name__ for found in classes if issubclass(found, errors.InlayError)]
    assert [row[0].strip("`") for row in table] == [name for name in own if name != "InlayError"]
