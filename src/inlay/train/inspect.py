"""Looking at what there is: `show` a model's places or an adapter folder, list the `methods`."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from inlay.engine import files
from inlay.engine.adapters import attach, detach
from inlay.engine.checkpoint import own_entry, read_methods
from inlay.engine.piece import Method
from inlay.engine.registry import all_methods, method_class, over_adapters
from inlay.engine.sites import SiteIndex
from inlay.engine.summary import summary
from inlay.engine.trained_copy import ModulesToSave
from inlay.errors import ConfigError, InlayError
from inlay.tasks.loading import folder_or_hub_id, quiet
from inlay.train.record import ADAPTER, RECORD_FILE, RUN_FILE, Record
from inlay.train.run import Run


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
    quantised: Mapping[str, Any] | None
    """How its matrices are stored, with the error, where they are codes."""
    modules_to_save: tuple[str, ...]
    record: Record | None
    """Of the run that made it, where that lies beside it."""
    adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The adapters of other runs that this run was made on, and where they came from."""
    compose: Any = None
    """How they run with its own."""


def show(place: str | Path) -> AdapterFolder | list[Places]:
    """An adapter (or run) folder's contents, or a model's places and roles. A model's weights are not read."""
    folder = Path(place)
    run = folder if (folder / ADAPTER / files.CONFIG).is_file() else folder.parent
    for candidate in (folder, folder / ADAPTER):
        if (candidate / files.CONFIG).is_file() or any((candidate / name).exists() for name in files.PICKLES):
            found = _show_adapter(candidate, Record.read(run) if (run / RECORD_FILE).is_file() else None)
            made = Run.from_yaml(run / RUN_FILE) if (run / RUN_FILE).is_file() else None
            return found if made is None else dataclasses.replace(found, adapters=made.adapters, compose=made.compose)
    return places(skeleton(str(place)))


def _show_adapter(folder: Path, record: Record | None) -> AdapterFolder:
    config = files.read_config(folder)
    tensors, _ = files.read_tensors(folder)
    stored, _ = files.read_stored(folder)
    methods, saved = read_methods(config, folder)
    return AdapterFolder(
        folder=str(folder),
        methods=tuple(repr(method) for method in methods if not isinstance(method, ModulesToSave)),
        peft_type=str(config.get("peft_type")),
        base_model=config.get("base_model_name_or_path"),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()})),
        tensors=len(tensors),
        quantised=own_entry(config).get("quantised"),
        modules_to_save=saved,
        record=record,
    )


def skeleton(name: str) -> nn.Module:
    """The model that a folder's or hub id's config.json describes, without its weights (on the meta device)."""
    path = Path(name).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise ConfigError(f"{name} holds neither an adapter (adapter_config.json) nor a model (config.json)")
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(str(folder_or_hub_id(name)))
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
    what: str
    """What it computes, in a line."""
    paper: str
    peft_type: str | None
    fields: Mapping[str, str]
    """Its own fields with their defaults."""
    parameters: int | None = None
    """Trained with the defaults in the model asked about, new heads aside."""
    uncounted: str | None = None
    """Why they could not be counted."""


def methods(kind: str | None = None, model: str | None = None) -> list[MethodRow]:
    """Every method (or one), those over other adapters last: its kind, the class, what it computes, the paper, HF
    peft's name for it, and its fields.

    `model`: a folder or hub id, in which the parameters of each are counted; its weights are not read.
    """
    classes = all_methods() if kind is None else [method_class(kind)]
    if kind is None and model is None:  # what these train depends on the adapters
        classes += over_adapters()
    base = None if model is None else skeleton(model)
    return [
        MethodRow(
            kind=cls.kind,
            name=cls.__name__,
            what=inspect.cleandoc(cls.__doc__ or "").partition("\n")[0],
            paper=cls.paper,
            peft_type=cls.peft_type,
            fields={field.name: _shown_default(field) for field in dataclasses.fields(cls)},
            **({} if base is None else _counted(cls, base)),
        )
        for cls in classes
    ]


def _counted(cls: type[Method], model: nn.Module) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():  # of block sizes and the like, which are no choice of the user's here
            warnings.simplefilter("ignore")
            attach(model, cls())
    except InlayError as error:
        return {"uncounted": str(error)}
    rows = summary(model).rows
    detach(model)
    return {"parameters": sum(row.parameters for row in rows if row.method != ModulesToSave.kind)}


def _shown_default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return (
        "{}" if field.default_factory is dict else "required" if field.default_factory is dataclasses.MISSING else "…"
    )
