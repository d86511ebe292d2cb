"""The demonstration data: what it says of itself, and that the script cuts exactly these files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from inlay.tasks.data import read_splits
from inlay.tasks.task import make_task

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cut_demo_data", EXAMPLES / "cut_demo_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_their_page_says(script: ModuleType) -> None:
    splits = read_splits(EXAMPLES / "data")
    page = (EXAMPLES / "data" / "README.md").read_text(encoding="utf-8")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 896, "validation": 360, "test": 540}
    assert all(f"| `{name}.jsonl` | {len(rows)} |" in page for name, rows in splits.items())
    assert "CC BY 3.0" in page
    task = make_task("text-classification").resolve(splits)
    assert task.labels == tuple(sorted(script.INTENTS))
    train, others = (
        [script.plain(text) for name in names for text in splits[name]["text"][:]]
        for names in (["train"], ["validation", "test"])
    )
    assert len(set(train)) == len(train)
    assert not set(train) & set(others)


def test_the_script_cuts_exactly_these_files(script: ModuleType, shared_data: Path) -> None:
    folder = shared_data / "text_classification" / "clinc150_small"
    published = {}
    for name, theirs in script.SPLITS.items():
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        published[theirs] = [[row["text"], row["label"]] for row in map(json.loads, lines)]
    for name, rows in script.cut(published).items():
        lines = (EXAMPLES / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert rows == [json.loads(line) for line in lines]
