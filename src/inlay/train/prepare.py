"""From a run's names to its objects: rows, task, tokenizer, model, methods. What `train` and `check` do first.

A method that has to see rows before it is made (`Method.wants_data`) sees them here, through `Method.prepare`: batches
of the training rows as the trainer would make them, in an order that the run's seed decides, and the model's own loss.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from inlay.engine.batches import Batches, Say
from inlay.engine.piece import Method
from inlay.engine.replication import replicate_layers
from inlay.engine.roles import new_heads
from inlay.errors import ConfigError, DataError
from inlay.tasks.data import read_splits
from inlay.tasks.mixture import mix
from inlay.tasks.quantised import loading
from inlay.tasks.task import make_task
from inlay.tasks.task_ids import SOURCE
from inlay.train import loaded, several
from inlay.train.arguments import resolved
from inlay.train.run import Run
from inlay.train.trainer import Numbered, SeededCollator, untouched_random_states


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything a run needs, with its defaults resolved; the model has no adapter yet."""

    run: Run
    task: Any
    tokenizer: Any
    model: Any
    methods: list[Method]
    splits: Mapping[str, Any]

    def shown(self, say: Say | None = None) -> Prepared:
        """The same with each method that wants data having seen some. Values and random states stay as they are.

        Raises ConfigError where several processes train together: each might come to another result.
        """
        wanting = [type(method).__name__ for method in self.methods if method.wants_data]
        if not wanting:
            return self
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"{wanting[0]} has to see data before training, which one process does alone: choose beforehand "
                "(inlay.select(…).save(FILE), then method.subset=FILE), or train in one process"
            )
        if torch.cuda.is_available() and not self.run.train.get("use_cpu") and self.run.load == "auto":
            self.model.to("cuda")  # where the trainer would put it
        batches = Batches(training_batches(self), say=say)
        with untouched_random_states():
            methods = [m.prepare(self.model, batches) if m.wants_data else m for m in self.methods]
        return dataclasses.replace(self, methods=methods)


def training_batches(ready: Prepared) -> Callable[[], Iterator[Mapping[str, Any]]]:
    """A function that goes over the training rows, in batches of the run's size; each time the same ones."""
    size, seed = int(ready.run.train["per_device_train_batch_size"]), ready.run.seed
    rows = ready.splits["train"]

    def batches() -> Iterator[Mapping[str, Any]]:
        features = ready.task.features(rows, ready.tokenizer, train=True)
        collator = SeededCollator(ready.task.collator(ready.tokenizer, ready.model), seed)
        numbered = Numbered(features)
        order = torch.randperm(len(numbered), generator=torch.Generator().manual_seed(seed)).tolist()
        for start in range(0, len(order), size):
            yield collator([dict(numbered[row]) for row in order[start : start + size]])

    return batches


def splits_of(run: Run, column: str | None = None) -> dict[str, Any]:
    """The run's rows by split, whichever there are; `column` may be the one that names the sources of mixtures."""
    splits = dict(read_splits(run.data.path)) if run.data.path is not None else {}
    named: dict[str, Any] = dict(run.data.named())
    for split, source in named.items():
        if isinstance(source, Mapping):
            temperature = run.data.temperature if split == "train" else 1.0
            named[split] = mix(
                source, split=split, temperature=temperature, seed=run.seed, named=SOURCE if column == SOURCE else None
            )
    return {**splits, **read_splits(named)} if named else splits


def rows_of(run: Run, column: str | None = None) -> dict[str, Any]:
    """The run's rows by split. Raises DataError when there are none to train on."""
    splits = splits_of(run, column)
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


def load_base(task: Any, run: Run, load: str) -> Any:
    """The run's base model with the layers that it asks for. ConfigError for ranges that the model has not."""
    model = task.load_model(run.model, **loading(load, run.dtype))
    return model if run.layer_replication is None else replicate_layers(model, run.layer_replication)


def prepare(run: Run, *, show: bool = True, say: Say | None = None) -> Prepared:
    """Read the rows, resolve the task on them, load tokenizer, model and the run's other adapters, and write out every
    default; then show the methods that want to see data some, unless `show` is false (a run that goes on: its adapters
    are then those that it has kept). `say` is told how far that has come.

    Raises an InlayError, before anything slow is done, for whatever in the run cannot work.
    """
    run.methods()
    column = several.task_column(run)
    others = loaded.sources(run) if show else loaded.kept(run, Path(run.out))
    task = task_of(run)
    splits = rows_of(run, column)
    run, task = several.told(run, task.resolve(several.hidden(splits, column)), splits, column)
    methods = run.methods()
    set_seed(run.seed)  # a new head starts from random numbers
    tokenizer = task.load_tokenizer(run.model)
    model = load_base(task, run, run.load)
    with untouched_random_states():
        loaded.load_others(model, others, task)
    loaded.beneath(model, run)
    if show and say is not None:
        for line in loaded.advice(others):
            say(line)
    ready = Prepared(
        run=resolved(run, methods, len(splits["train"]), "validation" in splits),
        task=task,
        tokenizer=tokenizer,
        model=model,
        methods=methods,
        splits=splits,
    )
    return ready.shown(say) if show else ready


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
