"""`check(run)`: everything that `train` does before its first step, and nothing after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from inlay.engine.adapters import adapters_of, attach
from inlay.engine.summary import summary
from inlay.train.inspect import folded
from inlay.train.loaded import arrange
from inlay.train.prepare import prepare, whole_modules
from inlay.train.run import Run

LOOKED_AT = 8
"""Rows that `check` turns into features."""


@dataclasses.dataclass(frozen=True)
class Check:
    """What a run would do."""

    run: Run
    """With every default written out."""
    task: str
    """How the task understood the data: columns, labels."""
    rows: Mapping[str, int]
    tokens: tuple[int, ...]
    """Lengths of the first rows, in tokens."""
    matched: Mapping[str, tuple[str, ...]]
    """By method, the places it would sit in, blocks folded together."""
    steps: int
    """Optimiser steps that the run would take."""
    trainable_parameters: int
    total_parameters: int


def check(run: Run) -> Check:
    """Resolve a run completely, read its first rows and set the method into the model; train nothing, write nothing.

    Raises whatever `train` would raise before its first step.
    """
    ready = prepare(run)
    attach(ready.model, ready.methods, modules_to_save=whole_modules(ready.model, run))
    arrange(ready.model, run)
    first = ready.splits["train"].select(range(min(LOOKED_AT, len(ready.splits["train"]))))
    features = list(ready.task.features(first, ready.tokenizer, train=True))
    ready.task.collator(ready.tokenizer, ready.model)([dict(feature) for feature in features])
    adapter = adapters_of(ready.model).get("default")
    matched: dict[str, tuple[str, ...]] = {}
    for method, placed in zip(adapter.methods, adapter.placed, strict=True):
        names = dict.fromkeys(site.name or "(the model)" for site, _ in placed)
        matched[method.kind] = tuple(f"{pattern}" for pattern, _ in folded(names))
    counts = summary(ready.model)
    return Check(
        run=ready.run,
        task=str(ready.task.describe()),
        rows={split: len(rows) for split, rows in ready.splits.items()},
        tokens=tuple(len(feature["input_ids"]) for feature in features if "input_ids" in feature),
        matched=matched,
        steps=steps_of(ready.run, len(ready.splits["train"])),
        trainable_parameters=counts.trainable_parameters,
        total_parameters=counts.total_parameters,
    )


def steps_of(run: Run, rows: int) -> int:
    """Optimiser steps of a resolved run on one device."""
    if (most := run.train.get("max_steps", -1)) > 0:
        return int(most)
    batch = run.train["per_device_train_batch_size"] * run.train.get("gradient_accumulation_steps", 1)
    return int(-(-rows // batch) * run.train["num_train_epochs"])
