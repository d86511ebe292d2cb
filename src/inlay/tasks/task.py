"""What a task is: columns to features, features to batches, the right model head, and metrics. And tasks by name.

A task is a frozen dataclass in a file of its own, named like its kind ("text-classification" is
`text_classification.py`); it is found by that name and imported on first use, so adding one edits nothing here.

    task = make_task("text-classification").resolve(read_splits("sst2/"))
    tokenizer, model = task.load_tokenizer(folder), task.load_model(folder)
    task.features(rows, tokenizer, train=True)      # what a trainer takes, with task.collator(tokenizer, model)
    task.evaluate(model, tokenizer, rows)           # {"loss": …, "accuracy": …}
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from inlay.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from inlay.tasks.batches import Pass

Batch = dict[str, "Tensor"]
Collator = Callable[[list[dict[str, Any]]], "Batch"]

PACKAGE = "inlay.tasks"
SUPPORT = frozenset(
    {
        "batches",
        "chat",
        "class_metrics",
        "classification",
        "columns",
        "data",
        "generation",
        "head_positions",
        "labels",
        "loading",
        "media",
        "mixture",
        "packing",
        "pictures",
        "prompts",
        "quantised",
        "readers",
        "sounds",
        "spans",
        "task",
        "task_ids",
        "text_metrics",
        "trimmed_model",
        "trimmed_tokenizer",
        "visual",
        "vocabulary",
    }
)
"""Files beside the tasks that are none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A job that a model is adapted to. Subclasses set `kind` and `roles` and fill in the methods.

    What a user leaves open (columns, labels, problem type) is None or empty until `resolve` completes it from the data;
    the completed task is kept with a run, so that evaluating or predicting later needs no guessing.
    """

    kind: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    few_labels: ClassVar[bool] = False
    """Whether the loss is a mean over few labelled positions, each by itself, of a head that costs much at each."""

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Role -> column name, such as {"text": "sentence", "label": "y"}."""
    guessed: tuple[str, ...] = ()
    """The roles whose columns were recognised by `resolve` rather than given."""
    max_length: int = 128
    """Tokens in an example at most, special tokens included."""
    task_id_column: str | None = None
    """The column that says which task a row is of, where the run's method learns several (`task_ids.py`)."""
    task_names: tuple[str, ...] = ()
    """These tasks, in the order of their numbers."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "features" in cls.__dict__:
            from inlay.tasks.task_ids import with_ids

            cls.features = with_ids(cls.features)  # type: ignore[method-assign]
        if "kind" in cls.__dict__:
            TASKS[cls.kind] = cls

    def __post_init__(self) -> None:
        from inlay.tasks.columns import check_roles

        check_fields(self)
        check_roles(self.columns, self.roles, self.kind)

    # -- from the data -----------------------------------------------------------------------------------------------

    def resolve(self, splits: Mapping[str, Dataset]) -> Self:
        """A completed copy: columns recognised by name and content, labels collected from the training rows.

        Raises DataError, naming file and line, for a missing column, an empty text, or a label in validation or test
        that training does not have; ConfigError for a role the task does not know.
        """
        from inlay.tasks.columns import parts, require

        if not splits:
            raise DataError("there is no data to resolve the task from: give at least one split")
        rows = splits.get("train", next(iter(splits.values())))
        for role, column in self.columns.items():
            for part in parts(rows, column):
                require(rows, part, role)
        columns = self.guess(rows)
        fresh = tuple(role for role in columns if role not in self.columns)
        return dataclasses.replace(self, columns=columns, guessed=self.guessed + fresh).complete(splits)

    def guess(self, rows: Dataset) -> dict[str, str]:
        """`columns` with the roles that were not given. Raises DataError when the needed ones cannot be told."""
        raise NotImplementedError

    def complete(self, splits: Mapping[str, Dataset]) -> Self:
        """This task, its columns known, with everything else that only the data can tell; checks every row."""
        return self

    def describe(self) -> str:
        """One or two lines on what `resolve` found, with the flag that changes it."""
        shown = ", ".join(f"{role}={column}" for role, column in self.columns.items())
        change = ",".join(f"{role}=…" for role in self.columns)
        how = f"guessed; change with --columns {change}" if self.guessed else "as given"
        details = self.details()
        return f"columns: {shown} ({how})" + (f"\n{details}" if details else "")

    def details(self) -> str:
        """The second line of `describe`."""
        return ""

    def column(self, role: str) -> str:
        """The column that plays `role`. Raises ConfigError before `resolve`."""
        if role not in self.columns:
            raise ConfigError(
                f"{self.kind} does not know its {role} column yet: call resolve(splits) first, "
                f"or give columns={{{role!r}: …}}"
            )
        return self.columns[role]

    # -- the model ---------------------------------------------------------------------------------------------------

    @property
    def primary_metric(self) -> tuple[str, bool]:
        """The metric that chooses the best checkpoint, and whether greater is better."""
        raise NotImplementedError

    def load_tokenizer(self, model: str | Path) -> PreTrainedTokenizerBase:
        """The model's tokenizer, as this task needs it. Raises ConfigError."""
        from inlay.tasks.loading import load_tokenizer

        return load_tokenizer(model)

    def load_model(self, model: str | Path, **kwargs: Any) -> PreTrainedModel:
        """The model from a local folder or the hub, under this task's head. Keyword arguments go to `from_pretrained`.

        Names of parameters that the file lacks, such as a new head's, are kept in `model.fresh_parameters`.
        Raises ConfigError (no such model, or one that cannot do this task) and CheckpointError (damaged files).
        """
        raise NotImplementedError

    # -- rows to batches to results ----------------------------------------------------------------------------------

    def features(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, train: bool) -> Dataset:
        """Tokenised rows with the columns that the model takes, and "labels" where the rows have them."""
        raise NotImplementedError

    def check_fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ConfigError when the tokenizer is not this model's, or an example can be more than it takes."""
        from inlay.tasks.batches import check_fit

        check_fit(model, tokenizer, self.max_length)

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
        """The function from features to one padded batch of tensors. Raises ConfigError where the two do not fit."""
        raise NotImplementedError

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        *,
        batch_size: int = 32,
        progress: bool = False,
    ) -> dict[str, float]:
        """The task's metrics on rows that have labels. The model's training flags are left as they were."""
        from inlay.tasks.batches import Pass
        from inlay.tasks.task_ids import ids_of

        self.check_fit(model, tokenizer)
        tasks = ids_of(self, rows)
        with Pass(model, tokenizer, batch_size, progress, "evaluating", tasks).opened() as through:
            return self.scores(rows, through)

    def predict(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        *,
        batch_size: int = 32,
        progress: bool = False,
    ) -> list[dict[str, Any]]:
        """One JSON-able result a row, in the order of the rows, which need no labels."""
        from inlay.tasks.batches import Pass
        from inlay.tasks.task_ids import ids_of

        self.check_fit(model, tokenizer)
        tasks = ids_of(self, rows)
        with Pass(model, tokenizer, batch_size, progress, "predicting", tasks).opened() as through:
            return self.answers(rows, through)

    def probe(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Batch | None:
        """A few examples on which two models can be compared; None where a few sentences will do."""
        return None

    def labelled(self, rows: Dataset) -> bool:
        """Whether the rows have what `evaluate` compares with; a published test split often has not."""
        return True

    def scores(self, rows: Dataset, through: Pass) -> dict[str, float]:
        """What `evaluate` returns, by way of a pass through a model in eval mode."""
        raise NotImplementedError

    def answers(self, rows: Dataset, through: Pass) -> list[dict[str, Any]]:
        """What `predict` returns, by way of a pass through a model in eval mode."""
        raise NotImplementedError

    # -- kept with a run ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON or YAML, read back by `Task.from_dict`."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.task_id_column is None:
            del plain["task_id_column"], plain["task_names"]
        return {"kind": self.kind} | {name: _plain(value) for name, value in plain.items()}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Task:
        """The task that `to_dict` described. Raises ConfigError for an unknown kind or field."""
        if "kind" not in fields:
            raise ConfigError(f"a task needs a kind, one of: {', '.join(kinds())}")
        return make_task(**{str(name): value for name, value in fields.items()})


TASKS: dict[str, type[Task]] = {}
"""Tasks whose file has been imported, by kind."""


def kinds() -> list[str]:
    """Every task's kind, sorted. Imports no task, and no torch."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    names = {module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)} - SUPPORT
    return sorted({name.replace("_", "-") for name in names} | set(TASKS))


def task_class(kind: str) -> type[Task]:
    """The `Task` subclass of this kind. Raises ConfigError, naming the nearest, when there is none."""
    name = kind.replace("_", "-")
    if name not in TASKS:
        if name not in kinds():
            raise ConfigError(f"there is no task {kind!r}{did_you_mean(name, kinds())}; tasks: {', '.join(kinds())}")
        importlib.import_module(f"{PACKAGE}.{name.replace('-', '_')}")
    return TASKS[name]


def make_task(kind: str, **fields: Any) -> Task:
    """A task from its kind and fields, as YAML or flags give them. Raises ConfigError for an unknown kind or field."""
    cls = task_class(kind)
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            near = did_you_mean(name, known)
            near = f"{near} It" if near else "; it"
            raise ConfigError(f"task {kind} has no field {name!r}{near} has: {', '.join(known)}")
    return cls(**fields)


def check_fields(task: Task) -> None:
    """Bring lists to tuples and check plain types, so that a bad value from YAML fails here and not in training."""
    for field in dataclasses.fields(task):
        value, kind = getattr(task, field.name), str(field.type)
        if value is None and "None" in kind:
            continue
        if kind.startswith("tuple"):
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ConfigError(f"task {task.kind}: {field.name} must be a list, not {value!r}")
            object.__setattr__(task, field.name, tuple(str(item) for item in value))
        elif kind.startswith("Mapping"):
            if not isinstance(value, Mapping):
                raise ConfigError(f"task {task.kind}: {field.name} must be a mapping (text: sentence), not {value!r}")
            object.__setattr__(task, field.name, {str(key): str(item) for key, item in value.items()})
        elif kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(task, field.name, float(value))
        else:
            expected = {"int": int, "float": float, "bool": bool}.get(kind, str)
            if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
                raise ConfigError(f"task {task.kind}: {field.name} must be {expected.__name__}, not {value!r}")
    for name, least in (("max_length", 2), ("max_new_tokens", 1), ("max_target_length", 1), ("num_beams", 1)):
        if getattr(task, name, least) < least:
            raise ConfigError(f"task {task.kind}: {name} must be at least {least}, not {getattr(task, name)}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
