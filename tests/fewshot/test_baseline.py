"""In-context learning beside every system: the same answers as a run of its own gives, and nothing where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlay.fewshot import FewShotRun, baseline, fewshot

ROWS = [
    {"text": f"the film was {'really ' * (number % 3)}{word}", "label": label}
    for number in range(6)
    for word, label in (("great", "pos"), ("terrible", "neg"))
]


@pytest.fixture
def settings(tmp_path: Path, bert_folder: Path) -> dict[str, Any]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    rows = str(tmp_path / "rows.jsonl")
    return {
        "train": rows, "test": rows, "model": str(bert_folder), "templates": ["{text} it was {mask}."], "shots": 2,
        "verbalizer": {"neg": "bad", "pos": "good"}, "recipe": {"steps": 2}, "out": str(tmp_path / "out"),
    }  # fmt: skip


def test_it_is_what_in_context_learning_says_on_the_same_split(settings: dict[str, Any], tmp_path: Path) -> None:
    report = fewshot(FewShotRun(**settings))
    (alone,) = fewshot(FewShotRun(**{**settings, "method": "icl", "out": str(tmp_path / "icl")})).seeds
    (result,) = report.seeds
    assert result.baseline is not None
    assert alone.baseline is None  # it is itself what the others are measured by
    assert result.split["digest"] == alone.split["digest"]
    assert result.baseline.test == alone.test
    # The prompts' lengths differ from row to row, and each counts the cost on rows of its own.
    assert result.baseline.tokens == pytest.approx(alone.tokens, rel=0.1)
    assert result.baseline.flops == pytest.approx(alone.flops, rel=0.1)
    assert result.baseline.tokens > 2 * result.tokens  # the demonstrations are read with every question
    assert "in context   accuracy" in str(report)
    assert result.adapters == 1
    assert not any(name.startswith("in-context") for name in result.stages)  # its time is not the system's
    stored = json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8"))
    assert stored["seeds"][0]["baseline"]["test"] == result.baseline.test


def test_of_many_test_rows_some_are_asked_and_a_resumed_run_asks_none(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "ROWS", 5)
    run = FewShotRun(**settings)
    (first,) = fewshot(run).seeds
    assert first.baseline is not None
    assert first.baseline.rows == 5
    monkeypatch.setattr(baseline, "cost", None)  # would raise
    (again,) = fewshot(run, resume=True).seeds
    assert again.baseline == first.baseline


@pytest.mark.parametrize(
    "change",
    [
        {"baseline": False},
        {"method": "standard", "templates": []},
        {"templates": ["{soft:2}{text} it was {mask}."]},
        {"method": "standard", "verbalizer": {"neg": "bad", "pos": "quite unheard"}},
    ],
)
def test_where_it_is_unwanted_or_cannot_be_asked_there_is_none(
    change: dict[str, Any], settings: dict[str, Any]
) -> None:
    report = fewshot(FewShotRun(**{**settings, **change}))
    assert report.seeds[0].baseline is None
    assert "in context" not in str(report)
