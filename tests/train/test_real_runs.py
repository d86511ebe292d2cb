"""Every task from a file of real rows to a folder with an adapter, and a real decoder that learns and then writes."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tasks.conftest import bert, models_folder, stories, t5, tiny_llama

from inlay.train import Record, Run, evaluate, predict, train

__all__ = ["bert", "models_folder", "stories", "t5", "tiny_llama"]

TASKS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "two texts": ("text-classification", "bert", "nli/snli/validation.jsonl", {}),
    "token-classification": ("token-classification", "bert", "ner/wnut17/validation.jsonl", {}),
    "masked-lm": ("masked-lm", "bert", "text/books_validation.txt.gz", {}),
    "causal-lm": ("causal-lm", "stories", "text/books_validation.txt.gz", {}),
    "prompt and completion": ("causal-lm", "stories", "generation/gsm8k/train.jsonl.gz", {}),
    "seq2seq": ("seq2seq", "t5", "generation/wiki_split/train.jsonl.gz", {}),
}


def cut(source: Path, count: int, folder: Path) -> Path:
    """The first rows of a real file as train, the next as validation; what they are is left to be guessed."""
    text = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    chosen = list(islice((line for line in text.decode().splitlines(keepends=True) if line.strip()), count + 16))
    folder.mkdir(parents=True, exist_ok=True)
    suffix = ".txt" if ".txt" in source.name else ".jsonl"
    (folder / f"train{suffix}").write_text("".join(chosen[:count]), encoding="utf-8")
    (folder / f"validation{suffix}").write_text("".join(chosen[count:]), encoding="utf-8")
    return folder


@pytest.fixture
def trained(request: pytest.FixtureRequest, shared_data: Path, tmp_path: Path) -> Callable[..., Record]:
    """Train on a cut of a real file, three steps unless told otherwise."""

    def run(task: str, model: str, file: str, count: int = 48, **settings: Any) -> Record:
        fields: dict[str, Any] = {
            "model": str(request.getfixturevalue(model)),
            "task": task,
            "data": str(cut(shared_data / file, count, tmp_path / "rows")),
            "method": {"kind": "lora", "r": 4},
            "max_length": 64,
            "out": str(tmp_path / "run"),
            "train": {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
        }
        return train(Run.from_settings(fields | settings), progress=False)

    return run


@pytest.mark.parametrize("case", TASKS)
def test_every_task_trains_evaluates_and_predicts_on_real_rows(trained: Callable[..., Record], case: str) -> None:
    task, model, file, settings = TASKS[case]
    record = trained(task, model, file, **settings)
    assert all(math.isfinite(value) for value in record.metrics["validation"].values())
    out = Path(record.out)
    validation = next((out.parent / "rows").glob("validation*"))
    again = evaluate(out, validation)
    assert again.get("loss", 0.0) == pytest.approx(record.metrics["validation"].get("loss", 0.0), rel=1e-4)
    if task == "masked-lm":  # which is asked to fill in what is left open
        validation = out.parent / "open.txt"
        validation.write_text("it was a [MASK] day\n" * record.rows["validation"], encoding="utf-8")
    assert len(predict(out, validation)) == record.rows["validation"]


def test_glue_layout_with_its_unlabelled_test_split_just_works(bert: Path, shared_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        with (shared_data / "text_classification" / "sst2_glue_tsv" / f"{split}.tsv").open(encoding="utf-8") as lines:
            (folder / f"{split}.tsv").write_text("".join(islice(lines, 41)), encoding="utf-8")
    fields = {"model": str(bert), "data": str(folder), "out": str(tmp_path / "run"), "train": {"max_steps": 2}}
    record = train(Run.from_settings(fields), progress=False)
    assert "accuracy" in record.metrics["validation"]
    assert "test" not in record.metrics


def test_a_real_decoder_learns_a_form_and_then_writes_it(trained: Callable[..., Record], tmp_path: Path) -> None:
    """260k parameters that have only told stories learn, from 400 menus, what a description of one sounds like."""
    record = trained(
        "causal-lm",
        "stories",
        "generation/e2e/train.jsonl.gz",
        count=400,
        max_length=160,
        method={"kind": "lora", "r": 16, "targets": "all-linear"},
        train={"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 5e-3},
    )
    curve = [json.loads(line) for line in (Path(record.out) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in curve if "loss" in line]
    # From about 4.4 nats a token to about 1.5 where this was written; half is far outside any seed's luck.
    assert losses[-1] < 0.5 * losses[0]
    row = {"source": "name[The Eagle], eatType[pub], food[Italian], area[riverside]"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    (answer,) = predict(record.out, tmp_path / "one.jsonl")
    text = str(answer["generation"])
    assert " is " in text
    assert not text.startswith("Once upon a time")
