"""The one place where transformers' TrainingArguments are made, and what they are when nobody says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from inlay.engine.piece import Method
from inlay.errors import ConfigError
from inlay.train.optimisation import check_optim, for_transformers
from inlay.train.run import Run
from inlay.train.settings import OWN_ARGUMENTS

LEARNING_RATE = 1e-3
"""For methods that name no `learning_rate` of their own: a few small matrices want ten times what a model wants."""

STEPS_WANTED, EPOCHS_AT_MOST = 300, 20
"""Small data is gone over until there have been so many steps, but not more often than this."""


def default_learning_rate(methods: Sequence[Method]) -> float:
    """The smallest learning rate that the methods name (class variable `learning_rate`), 1e-3 for those that do not."""
    return min(float(getattr(type(method), "learning_rate", LEARNING_RATE)) for method in methods)


def default_epochs(rows: int, batch: int) -> int:
    """3, or more on small data: as many as make `STEPS_WANTED` optimiser steps, at most `EPOCHS_AT_MOST`."""
    return max(3, min(EPOCHS_AT_MOST, math.ceil(STEPS_WANTED / max(1, math.ceil(rows / batch)))))


def resolved(run: Run, methods: Sequence[Method], rows: int, evaluates: bool) -> Run:
    """The run with every default that depends on the method or the data written out in its `train` settings."""
    given = dict(run.train)
    check_optim(given.get("optim"))
    batch = given.get("per_device_train_batch_size", 16)
    settings: dict[str, Any] = {
        "learning_rate": default_learning_rate(methods),
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 4 * batch,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.06,
        "logging_steps": 10,
        "save_strategy": "epoch",
        "report_to": "none",
    }
    if given.get("max_steps", -1) <= 0:
        settings["num_train_epochs"] = default_epochs(rows, batch * given.get("gradient_accumulation_steps", 1))
    if evaluates:
        settings["eval_strategy"] = "steps" if given.get("eval_steps") else "epoch"
    if given.get("save_steps"):
        settings["save_strategy"] = "steps"
    return run.replace(train={**settings, **given})


def training_arguments(run: Run, folder: Path, metric: tuple[str, bool]) -> TrainingArguments:
    """transformers' arguments for a resolved run. Raises ConfigError for a value that transformers refuses."""
    fixed: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": run.seed,
        "data_seed": run.seed,
        "metric_for_best_model": metric[0],
        "greater_is_better": metric[1],
        "disable_tqdm": True,  # the run has its own bar
        "logging_nan_inf_filter": False,  # a loss that is no number is an error here, not something to average away
        "remove_unused_columns": False,  # the task has made exactly what the model takes
        "dataloader_pin_memory": run.train.get("dataloader_pin_memory", torch.cuda.is_available()),
    }
    own = for_transformers(run.train)
    theirs = {name: value for name, value in own.items() if name not in OWN_ARGUMENTS}
    try:
        return TrainingArguments(**{**theirs, **fixed})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"the `train:` settings do not work together: {' '.join(str(error).split())}") from error
