"""From a run's names to its objects: rows, task, tokenizer, model, methods. What `train` and `check` do first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import set_seed

from inlay.engine.piece import Method
from inlay.engine.roles import new_heads
from inlay.errors import ConfigError, DataError
from inlay.tasks.data import read_splits
from inlay.tasks.quantised import loading
from inlay.tasks.task import make_task
from inlay.train.arguments import resolved
from inlay.train.run import Run


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything a run needs, with its defaults resolved; the model has no adapter yet."""

    run: Run
    task: Any
    tokenizer: Any
    model: Any
    methods: list[Method]
    splits: Mapping[str, Any]


def rows_of(run: Run) -> dict[str, Any]:
    """The run's rows by split. Raises DataError when there are none to train on."""
    splits = dict(read_splits(run.data.path)) if run.data.path is not None else {}
    named = {split: path for split in ("train", "validation", "test") if (path := getattr(run.data, split)) is not None}
    if named:
        splits |= read_splits(named)
    if "train" not in splits:
        have = f"the data has only {', '.join(splits)}" if splits else "no data is named"
        raise DataError(f"there are no rows to train on ({have}): give --train FILE, or `data: {{train: FILE}}`")
    return splits


def task_of(run: Run) -> Any:
    """The run's task, before it has seen any rows."""
    options = {name: value for name, value in run.task.items() if name != "kind"}
    if run.max_length is not None:
        options["max_length"] = run.max_length
    return make_task(run.task["kind"], columns=dict(run.columns), **options)


def prepare(run: Run) -> Prepared:
    """Read the rows, resolve the task on them, load tokenizer and model, and write out every default.

    Raises an InlayError, before anything slow is done, for whatever in the run cannot work.
    """
    methods = run.methods()
    task = task_of(run)
    splits = rows_of(run)
    task = task.resolve(splits)
    set_seed(run.seed)  # a new head starts from random numbers
    tokenizer = task.load_tokenizer(run.model)
    model = task.load_model(run.model, **loading(run.load, run.dtype))
    return Prepared(
        run=resolved(run, methods, len(splits["train"]), "validation" in splits),
        task=task,
        tokenizer=tokenizer,
        model=model,
        methods=methods,
        splits=splits,
    )


def whole_modules(model: Any, run: Run) -> list[str] | None:
    """What to train and save whole: the run's own choice, or (None) new heads, and what else the base's files lack.

    Raises ConfigError when the run's choice leaves out a module that starts from random numbers: these would be other
    numbers each time the adapter is loaded.
    """
    fresh = {name.rpartition(".")[0] for name in getattr(model, "fresh_parameters", ())}
    chosen = new_heads(model) if run.modules_to_save is None else list(run.modules_to_save)
    beside = sorted(path for path in fresh if not any(f".{name}." in f".{path}." for name in chosen))
    if not beside:
        return None if run.modules_to_save is None else chosen
    if run.modules_to_save is not None:
        raise ConfigError(
            f"modules_to_save={chosen} leaves out {', '.join(beside)}, which {run.model} has no weights for: random "
            "numbers that would be others each time the adapter is loaded. Add it, or leave modules_to_save out"
        )
    return [*chosen, *beside]


def same_run(given: Run, stored: Run, where: Path) -> None:
    """Raise ConfigError when a run to be resumed is not the one that began: its curve would be no one's."""
    before = _flat(stored.to_dict())
    for key, value in _flat(given.to_dict()).items():
        if key != "out" and before.get(key, value) != value:
            raise ConfigError(
                f"--resume goes on with the run in {where}, where {key} is {before[key]!r}, not {value!r}: leave the "
                "setting out, or start a new run with another --out"
            )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree}
