"""What is done with a few-shot run afterwards: predict, evaluate, explain."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from inlay.errors import CheckpointError, ConfigError, DataError, did_you_mean
from inlay.fewshot.base import Base
from inlay.fewshot.embedded import embedded_model
from inlay.fewshot.explaining import Explanation, explained
from inlay.fewshot.predictor import Solution
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.run import RUN_FILE, FewShotRun, is_few_shot
from inlay.tasks import columns as named_columns
from inlay.tasks.class_metrics import single_label_scores
from inlay.tasks.data import read_splits, source_name
from inlay.tasks.labels import check_known, label_name
from inlay.train.use import check_writable, write_predictions

SOLUTION_FILE = "solution.json"


def seed_folder(out: Path, seed: int) -> Path:
    """Where a seed's stages and solution lie."""
    return out / f"seed-{seed}"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A few-shot run in memory."""

    run: FewShotRun
    base: Base
    solution: Solution

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the scores."""
        return self.solution.labels


def open_few_shot(folder: str | Path, seed: int | None = None) -> Opened:
    """The solution of a run (of its first seed, unless another is named). CheckpointError where there is none."""
    folder = Path(folder)
    if not is_few_shot(folder):
        raise CheckpointError(f"{folder} is not the folder of a few-shot run (it has no {RUN_FILE})")
    run = FewShotRun.from_yaml(folder / RUN_FILE)
    chosen = run.seeds[0] if seed is None else seed
    if chosen not in run.seeds:
        raise ConfigError(f"the run in {folder} has no seed {chosen}; it has {', '.join(map(str, run.seeds))}")
    place = seed_folder(folder, chosen)
    if not (place / SOLUTION_FILE).is_file():
        raise CheckpointError(f"seed {chosen} of the run in {folder} has not ended: go on with --resume")
    try:
        fields = json.loads((place / SOLUTION_FILE).read_text(encoding="utf-8"))
        base = Base(str(embedded_model()) if run.model is None else run.model, run.dtype, load=run.load)
        return Opened(run, base, Solution.from_dict(fields, place, base))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{place / SOLUTION_FILE} is damaged ({error!r})") from error


def predict(
    folder: str | Path,
    data: Any,
    out: str | Path | None = None,
    *,
    split: str | None = None,
    seed: int | None = None,
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """For each row (of a file, or a list of rows or texts) its label, and the probability of each label.

    `split` says which, where the data have several. Also written to `out` (.jsonl, .json or .csv), if that is given.
    Raises DataError for the rows.
    """
    check_writable(out)
    opened = open_few_shot(folder, seed)
    rows = _rows(opened, data, split)
    probabilities = opened.solution.scores(opened.base, rows, batch_size=batch_size).softmax(-1)
    found = [
        {
            **row,
            "prediction": opened.labels[int(each.argmax())],
            "scores": dict(zip(opened.labels, each.tolist(), strict=True)),
        }
        for row, each in zip(rows, probabilities, strict=True)
    ]
    write_predictions(found, out)
    return found


def evaluate(
    folder: str | Path,
    data: Any = None,
    *,
    split: str | None = None,
    seed: int | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """The metrics on labelled rows (by default the run's own test rows, or another `split` of its rows)."""
    opened = open_few_shot(folder, seed)
    rows = _picked(data, split) if data is not None else _own(opened.run, split or "test")
    label = opened.run.label or named_columns.named(rows, named_columns.LABEL)
    if label is None or label not in rows.column_names:
        raise no_label(rows, label)
    check_known([[label_name(value)] for value in rows[label]], opened.labels, rows, "test", from_train=True)
    scores = opened.solution.scores(opened.base, rows.to_list(), batch_size=batch_size)
    true = np.array([opened.labels.index(label_name(value)) for value in rows[label]])
    return single_label_scores(scores.argmax(-1).numpy(), true)


def explain(
    folder: str | Path, data: Any, *, seed: int | None = None, top: int = 5, rows: int | None = None
) -> list[Explanation]:
    """For each row and each way of asking: the text that the model reads, and its likeliest words at the mask."""
    opened = open_few_shot(folder, seed)
    return explained(opened.base, opened.solution, _rows(opened, data)[:rows], top=top)


def no_label(rows: Dataset, label: str | None) -> DataError:
    """The error for rows whose column of labels is not there, or (None) cannot be told."""
    if label is None:
        there = ", ".join(rows.column_names)
        return DataError(f"{source_name(rows)}: which column is the label? It has: {there}. Say it with --label COLUMN")
    return DataError(
        f"{source_name(rows)} has no column {label!r}{did_you_mean(label, rows.column_names)}; it has: "
        f"{', '.join(rows.column_names)}"
    )


def _picked(source: Any, split: str | None) -> Dataset:
    """A source's rows: the split that is named, otherwise its test rows, or those that there are."""
    splits = read_splits(source)
    chosen = split or next(name for name in ("test", "train", "validation") if name in splits)
    if chosen not in splits:
        raise DataError(f"the data have no split {split!r}; they have: {', '.join(splits)}")
    return splits[chosen]


def _own(run: FewShotRun, split: str) -> Dataset:
    """Rows of the run itself. Raises DataError where there are none."""
    if split == "test" and run.test is not None:
        return _picked(run.test, None)
    splits = read_splits(run.train)
    if split not in splits:
        raise DataError(f"the run has no {split} rows of its own: give --data FILE")
    return splits[split]


def _rows(opened: Opened, data: Any, split: str | None = None) -> Sequence[Row]:
    """Rows of a file, of a `datasets` object, or of a list of rows or of texts (where one column is all there is)."""
    if not isinstance(data, list | tuple):
        rows: list[Row] = _picked(data, split).to_list()
        return rows
    columns = opened.solution.columns
    if len(columns) != 1 and any(isinstance(row, str) for row in data):
        raise DataError(f"the model reads the columns {', '.join(columns)}: give rows that have them, not plain texts")
    return [{columns[0]: row} if isinstance(row, str) else row for row in data]
