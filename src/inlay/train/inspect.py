"""Looking without training: `check` a run, `show` a model's places or an adapter folder, list the `methods`."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from inlay.engine import files
from inlay.engine.adapters import adapters_of, attach
from inlay.engine.checkpoint import read_methods
from inlay.engine.registry import all_methods, method_class
from inlay.engine.sites import SiteIndex
from inlay.engine.summary import summary
from inlay.engine.trained_copy import ModulesToSave
from inlay.errors import ConfigError
from inlay.tasks.loading import quiet
from inlay.train.prepare import prepare
from inlay.train.record import RECORD_FILE, Record
from inlay.train.run import Run

LOOKED_AT = 8
"""Rows that `check` turns into features."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Places that differ only in the number of their block."""

    pattern: str
    """The name, with the numbers as a range: encoder.layer.{0-5}.attention.self.query."""
    count: int
    kind: str
    roles: tuple[str, ...]
    shape: tuple[int, ...]
    """Of the parameter; empty for plain modules."""


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
    attach(ready.model, ready.methods, modules_to_save=run.modules_to_save)
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


def folded(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Names that differ only in numbers, together: "layer.{0-5}.query" and the names behind it, in their order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "#", name), []).append(name)
    return [(_fold(pattern, members), members) for pattern, members in groups.items()]


def _fold(pattern: str, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    numbers = [[int(part) for part in name.split(".") if part.isdigit()] for name in names]
    for column in zip(*numbers, strict=True):
        pattern = pattern.replace("#", _ranges(sorted(set(column))), 1)
    return pattern


def _ranges(numbers: list[int]) -> str:
    runs = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return runs[0] if len(numbers) == 1 else "{" + ",".join(runs) + "}"


# -- show --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk."""

    folder: str
    methods: tuple[str, ...]
    """Each with the fields that were set."""
    peft_type: str
    """What HF peft reads it as; "INLAY" when only Inlay can."""
    base_model: str | None
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    tensors: int
    modules_to_save: tuple[str, ...]
    record: Record | None
    """Of the run that made it, where that lies beside it."""


def show(place: str | Path) -> AdapterFolder | list[Places]:
    """An adapter (or run) folder's contents, or a model's places and roles. A model's weights are not read."""
    folder = Path(place)
    run = folder if (folder / "adapter" / files.CONFIG).is_file() else folder.parent
    for candidate in (folder, folder / "adapter"):
        if (candidate / files.CONFIG).is_file() or any((candidate / name).exists() for name in files.PICKLES):
            return _show_adapter(candidate, Record.read(run) if (run / RECORD_FILE).is_file() else None)
    return places(skeleton(str(place)))


def _show_adapter(folder: Path, record: Record | None) -> AdapterFolder:
    config = files.read_config(folder)
    tensors, _ = files.read_tensors(folder)
    methods, saved = read_methods(config, folder)
    return AdapterFolder(
        folder=str(folder),
        methods=tuple(repr(method) for method in methods if not isinstance(method, ModulesToSave)),
        peft_type=str(config.get("peft_type")),
        base_model=config.get("base_model_name_or_path"),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        tensors=len(tensors),
        modules_to_save=saved,
        record=record,
    )


def skeleton(name: str) -> nn.Module:
    """The model that a folder's or hub id's config.json describes, without its weights (on the meta device)."""
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise ConfigError(f"{name} holds neither an adapter (adapter_config.json) nor a model (config.json)")
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no model can be had from {name}: {' '.join(str(error).split())[:200]}") from error
    kinds = [getattr(transformers, kind, None) for kind in getattr(config, "architectures", None) or ()]
    with torch.device("meta"), quiet():
        if kinds and kinds[0] is not None:
            return kinds[0](config)  # type: ignore[no-any-return]
        return transformers.AutoModel.from_config(config)  # type: ignore[no-untyped-call,no-any-return]


def places(model: nn.Module) -> list[Places]:
    """A model's places that have parameters of their own or a role, blocks folded together."""
    index = SiteIndex(model)
    by_name = index.by_name()
    found = []
    for pattern, members in folded(name for name, site in by_name.items() if site.kind != "module" or site.roles):
        site = by_name[members[0]]
        shape = () if site.kind in ("module", "attention") else tuple(site.weight.shape)
        found.append(Places(pattern or "(the model)", len(members), site.kind, tuple(sorted(site.roles)), shape))
    return found


# -- methods -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """One method, as `inlay methods` lists it."""

    kind: str
    name: str
    paper: str
    peft_type: str | None
    fields: Mapping[str, str]
    """Its own fields with their defaults."""


def methods(kind: str | None = None) -> list[MethodRow]:
    """Every method (or one): its kind, the class, the paper, HF peft's name for it, and its fields."""
    return [
        MethodRow(
            kind=cls.kind,
            name=cls.__name__,
            paper=cls.paper,
            peft_type=cls.peft_type,
            fields={field.name: _shown_default(field) for field in dataclasses.fields(cls)},
        )
        for cls in (all_methods() if kind is None else [method_class(kind)])
    ]


def _shown_default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return (
        "{}" if field.default_factory is dict else "required" if field.default_factory is dataclasses.MISSING else "…"
    )
