"""A run: everything that decides what training does, in one frozen dataclass that YAML, flags and Python all produce.

    model: bert-base-uncased            # a folder or a hub id
    task: text-classification           # or {kind: …, and the task's own options}
    data: {train: train.jsonl, validation: dev.jsonl}
    columns: {text: sentence, label: y} # guessed, and printed, when left out
    method: {kind: lora, r: 16}         # or a name, or a list of these
    train: {learning_rate: 1e-3}        # transformers' own names
    out: runs/lora
    adapters: {sst2: runs/sst2}         # of other runs, loaded first and frozen (`others.py`)
    compose: sst2                       # what runs beneath the new adapter, or around it

Reading and checking a run imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from inlay.engine import catalogue
from inlay.errors import ConfigError, did_you_mean
from inlay.tasks.quantised import check_load
from inlay.train import others
from inlay.train import settings as read
from inlay.train.optimisation import Optimisation
from inlay.train.options import Options

if TYPE_CHECKING:
    from inlay.engine.piece import Method

RESERVED = {"output_dir": "out", "seed": "seed", "data_seed": "seed", "resume_from_checkpoint": "--resume"}
"""Training arguments that the run itself decides, and where."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where the rows are: one file for each split, or a `path` (a folder or a hub id) that has them all.

    A split can also be several files or folders by name, {hausa: hau.jsonl, swahili: swa.jsonl} (`tasks/mixture.py`).
    """

    path: str | None = None
    """A folder with train/validation/test files, or a hub id."""
    train: str | Mapping[str, str] | None = None
    """The rows to train on."""
    validation: str | Mapping[str, str] | None = None
    """The rows that choose the best checkpoint."""
    test: str | Mapping[str, str] | None = None
    """The rows looked at once, at the end."""
    temperature: float = 1.0
    """T of a mixture to train on: each source has a share ∝ (its rows)^(1/T) of an epoch; above 1 helps small ones."""

    def named(self) -> dict[str, str | Mapping[str, str]]:
        """The splits that are given one by one."""
        found = {split: getattr(self, split) for split in ("train", "validation", "test")}
        return {split: source for split, source in found.items() if source is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What to train, on what, how, and where to leave it. Raises ConfigError for a setting that cannot be used."""

    model: str
    """The base model: a folder or a hub id."""
    task: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "text-classification"})
    """The task's `kind` and options; a plain name will do."""
    data: Data = dataclasses.field(default_factory=Data)
    """The splits; a string is a folder or hub id, a mapping has train, validation, test."""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Which column plays which part, {"text": "sentence"}; what is left out is guessed."""
    method: Sequence[Mapping[str, Any]] = dataclasses.field(default_factory=lambda: [{"kind": "lora"}])
    """The method's `kind` and fields, or several; a plain name or a Method object will do."""
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """transformers' TrainingArguments by their own names; the rest have defaults (see `arguments.py`)."""
    out: str = ""
    """The folder to leave everything in; by default runs/<task>-<method>."""
    seed: int = 0
    """Of initialisation, order and dropout."""
    max_length: int | None = None
    """Tokens kept of each text; by default the task decides."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained and saved whole beside the method; by default the task's new head, [] for none."""
    dtype: str = "auto"
    """Of the base model's weights: auto (as saved), float32, bfloat16, float16."""
    load: str = "auto"
    """How the base is held: auto (as saved), 4bit (NF4, as in QLoRA) or 8bit; then dtype is what it computes in."""
    layer_replication: Sequence[Sequence[int]] | None = None
    """Ranges [first, last + 1] of the base's layers that make a deeper base, [[0, 4], [2, 6]]; weights are shared."""
    adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Adapters of other runs by name, {"sst2": "runs/sst2"}: loaded before the method, and frozen."""
    compose: Any = None
    """How they run with this run's own, "default": a name, or such as {"stack": ["sst2", "default"]} (plain data)."""
    task_id_column: str | None = None
    """Which column says the task of a row, for methods of several tasks; by default the source in a mixture."""

    def __post_init__(self) -> None:
        fixed: dict[str, Any] = {
            "model": _text(self.model, "model"),
            "task": _with_kind(self.task, "task"),
            "data": _data(self.data),
            "columns": _columns(self.columns),
            "method": _methods(self.method),
            "train": _train(self.train),
            "seed": read.typed(self.seed, "int", "seed"),
            "max_length": read.typed(self.max_length, "int | None", "max_length"),
            "modules_to_save": _names(self.modules_to_save, "modules_to_save"),
            "layer_replication": _ranges(self.layer_replication),
            "task_id_column": None if self.task_id_column is None else _text(self.task_id_column, "task_id_column"),
            "adapters": others.adapters_from(self.adapters),
        }
        fixed["method"] = [others.over_adapters(method, fixed["adapters"]) for method in fixed["method"]]
        fixed["compose"] = others.composition_from(self.compose, fixed["adapters"], fixed["method"])
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length is a number of tokens, at least 1; got {self.max_length}")
        if self.dtype not in (dtypes := ["auto", "float32", "bfloat16", "float16"]):
            raise ConfigError(f"dtype must be one of {', '.join(dtypes)}; got {self.dtype!r}")
        check_load(self.load)
        default = f"runs/{fixed['task']['kind']}-{'+'.join(str(method['kind']) for method in fixed['method'])}"
        fixed["out"] = str(self.out or default)
        for name, value in fixed.items():
            object.__setattr__(self, name, value)

    # -- from the outside --------------------------------------------------------------------------------------------

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], where: str = "the run") -> Run:
        """A run from nested plain settings, as YAML has them. Raises ConfigError naming the key and its section."""
        settings = read.renamed(settings, read.ALIASES, where)
        names = [field.name for field in dataclasses.fields(cls)]
        arguments = {**read.training_arguments(), **read.OWN_ARGUMENTS, **dict.fromkeys(read.TRAIN_ALIASES, "")}
        for key in list(settings):
            if key in names:
                continue
            if key in read.DATA_ALIASES:  # at the top level elsewhere; here they have a section
                _move(settings, key, "data", read.DATA_ALIASES[key], where)
            elif key in arguments and key not in RESERVED:
                _move(settings, key, "train", key, where)
            elif key in read.METHOD_ALIASES:
                raise ConfigError(f"{where}: {key!r} belongs in the `method:` section ({read.METHOD_ALIASES[key]})")
            else:
                near = did_you_mean(str(key), [*names, *read.ALIASES, *arguments])
                near = f"{near} It" if near else "; it"
                raise ConfigError(f"{where} has no setting {key!r}{near} has: {', '.join(names)}")
        if settings.get("model") in (None, ""):
            raise ConfigError(
                f"{where} names no model: add `model:` to the file, or --model, with a folder or a hub id"
            )
        return cls(**{key: value for key, value in settings.items() if value is not None})

    @classmethod
    def from_yaml(
        cls, path: str | Path | None, flags: Mapping[str, Any] | None = None, sets: Iterable[str] = ()
    ) -> Run:
        """A run from a YAML file (or none), then the flags that are given, then `a.b=value` overrides."""
        settings = read.renamed(read.read_yaml(path), read.ALIASES, str(path)) if path is not None else {}
        for key, value in (flags or {}).items():
            if value is None or value in ([], {}):
                continue
            if key != "compose" and isinstance(value, Mapping) and isinstance(settings.get(key), Mapping):
                settings[key] = {**settings[key], **value}
            else:
                settings[key] = value
        settings.setdefault("method", "lora")
        settings.setdefault("task", "text-classification")
        for section in ("task", "method"):
            settings[section] = _opened(settings[section])
        for assignment in sets:
            read.put(settings, assignment)
        return cls.from_settings(settings, str(path) if path is not None else "the run")

    # -- to the outside ----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain nested settings that make this run again."""
        data = {key: value for key, value in dataclasses.asdict(self.data).items() if value is not None}
        if data["temperature"] == 1:
            del data["temperature"]
        methods = [dict(method) for method in self.method]
        settings = {
            "model": self.model,
            "task": dict(self.task),
            "data": data,
            "columns": dict(self.columns),
            "method": methods[0] if len(methods) == 1 else methods,
            "train": dict(self.train),
            "out": self.out,
            "seed": self.seed,
            "max_length": self.max_length,
            "modules_to_save": None if self.modules_to_save is None else list(self.modules_to_save),
            "dtype": self.dtype,
            "load": self.load,
            "layer_replication": self.layer_replication,
            "task_id_column": self.task_id_column,
            "adapters": dict(self.adapters),
            "compose": self.compose,
        }
        return {key: value for key, value in settings.items() if value is not None and value != {}}

    def to_yaml(self) -> str:
        """The same as YAML text. Raises ConfigError for a value that has no written form, such as a function."""
        try:
            return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)
        except yaml.representer.RepresenterError as error:
            raise ConfigError(
                f"the run holds a value that run.yaml cannot hold ({error.args[-1]!r}): give targets as names, roles "
                "or patterns, or train with inlay.attach and a loop of your own"
            ) from error

    def replace(self, **changes: Any) -> Run:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def methods(self) -> list[Method]:
        """The method objects. Raises ConfigError for a field that the method has not. Imports torch."""
        from inlay.engine.registry import make_method

        return [
            make_method(fields["kind"], {name: value for name, value in fields.items() if name != "kind"})
            for fields in self.method
        ]


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{key} must be a name or a path, got {value!r}")
    return str(value)


def _names(value: Any, key: str) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{key} must be a list of names, got {value!r}")
    return [_text(name, key) for name in value]


def _ranges(value: Any) -> list[list[int]] | None:
    """Ranges of layers as lists; how many layers there are is known once the model is."""
    if value is None:
        return None
    pairs = value if isinstance(value, list | tuple) else []
    lists = [list(pair) if isinstance(pair, list | tuple) else [] for pair in pairs]
    if not lists or not all(len(pair) == 2 and all(type(n) is int for n in pair) for pair in lists):
        raise ConfigError(
            f"layer_replication={value!r}: pairs [first, last + 1] of layers are needed, such as [[0, 4], [2, 6]]"
        )
    return lists


def _move(settings: dict[str, Any], key: str, section: str, name: str, where: str) -> None:
    value = settings.pop(key)
    inside = settings.get(section) or {}
    if isinstance(inside, str):
        inside = {"path": inside}
    if not isinstance(inside, Mapping):
        raise ConfigError(f"{where}: `{section}:` should hold `name: value` settings, got {inside!r}")
    if inside.get(name, value) != value:
        raise ConfigError(f"{where} sets {key!r} twice, here and in `{section}:`; keep one")
    settings[section] = {**inside, name: value}


def _opened(value: Any) -> Any:
    """Names as mappings, so that `--set method.r=16` has something to write into."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, list):
        return _opened(value[0]) if len(value) == 1 else [_opened(entry) for entry in value]
    return dict(value) if isinstance(value, Mapping) else value


def _with_kind(value: Any, key: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
        raise ConfigError(f"{key} must be a name, or a mapping with `kind:`; got {value!r}")
    return {"kind": value["kind"], **value}


def _data(value: Any) -> Data:
    if isinstance(value, Data):
        return value
    if isinstance(value, str | Path):
        return Data(path=str(value))
    if not isinstance(value, Mapping):
        raise ConfigError(f"data must be a path, or a mapping with train, validation, test; got {value!r}")
    value = read.renamed(value, {**read.DATA_ALIASES, "dev": "validation", "valid": "validation"}, "data")
    read.known_only(value, [field.name for field in dataclasses.fields(Data)], "data")
    temperature = value.get("temperature", 1.0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ConfigError(f"data.temperature={temperature!r}: a number above 0 is needed, such as 3")
    if temperature != 1 and not isinstance(value.get("train"), Mapping):
        raise ConfigError("data.temperature mixes several sources: give data.train as {name: file, name: file}")
    sources = {key: _source(source, f"data.{key}") for key, source in value.items() if key != "temperature"}
    return Data(**sources, temperature=float(temperature))


def _source(value: Any, key: str) -> Any:
    """A file's name, or several by the names of what they hold."""
    if not isinstance(value, Mapping):
        return None if value is None else _text(str(value), key)
    if key == "data.path" or not value:
        raise ConfigError(f"{key} must be a path, got {value!r}")
    return {_text(name, key): _text(str(source), f"{key}.{name}") for name, source in value.items()}


def _columns(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"columns must be a mapping such as {{text: sentence, label: y}}; got {value!r}")
    return {_text(part, "columns"): _text(column, f"columns.{part}") for part, column in value.items()}


def _methods(value: Any) -> list[dict[str, Any]]:
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries:
        raise ConfigError("method is an empty list; name at least one (`inlay methods` lists them)")
    return [_method(entry) for entry in entries]


def _method(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a Method object
        given = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != _default(field)
        }
        value = {"kind": getattr(value, "kind", None), **given}
    if isinstance(value, Mapping):
        value = read.renamed(value, read.METHOD_ALIASES, "method")
    fields = _with_kind(value, "method")
    kinds = [*catalogue.kinds(), *catalogue.combining()]
    kind = fields["kind"] if fields["kind"] in kinds else fields["kind"].lower().replace("-", "_")
    if kind in others.SHORT:
        return {**others.SHORT[kind], **{name: given for name, given in fields.items() if name != "kind"}}
    if kind not in kinds:
        near = did_you_mean(kind, kinds)
        raise ConfigError(f"there is no method {fields['kind']!r}{near} (`inlay methods` lists them all)")
    return {**fields, "kind": kind}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _train(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"train must be a mapping of training arguments; got {value!r}")
    value = read.renamed(value, read.TRAIN_ALIASES, "train")
    known = {**read.training_arguments(), **read.OWN_ARGUMENTS}
    for key in value:
        if key in RESERVED:
            raise ConfigError(f"train.{key} is decided by the run itself: use {RESERVED[key]}")
        if key in {field.name for field in dataclasses.fields(Run)}:
            raise ConfigError(f"train has no setting {key!r}: it belongs at the top level, not in the `train:` section")
    read.known_only(value, known, "train")
    settings = {key: read.typed(entry, known[key], f"train.{key}") for key, entry in value.items()}
    Options.of(settings)
    Optimisation.of(settings)
    return settings
