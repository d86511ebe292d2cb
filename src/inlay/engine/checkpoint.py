"""To disk and back, in the ecosystem's format: HF peft's `adapter_config.json` and `adapter_model.safetensors`.

A method that peft has is written exactly as peft would; anything else, and any combination, gets `"peft_type":
"INLAY"`, which peft refuses by name instead of reading wrongly. Either way `auto_mapping`, the one free-form entry of
peft's config (any other key would make peft warn), has an `"inlay"` part: the methods with their fields, the version,
and a fingerprint of the base model. Neither reading nor writing needs peft or a network. See docs/checkpoints.md.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from inlay.engine import adapters as engine
from inlay.engine import codes, files, replication
from inlay.engine.fingerprint import compare, fingerprint
from inlay.engine.peft_names import ambiguous, as_peft_writes, brought_parameters, prefixed, shortest_names
from inlay.engine.piece import Method
from inlay.engine.registry import all_methods, make_method, over_adapters
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.tensor_file import owned
from inlay.engine.trained_copy import ModulesToSave
from inlay.errors import BaseModelError, CheckpointError, InlayError, TargetError, UnsupportedError, did_you_mean

FORMAT = 2
"""1, and 2 where matrices are quantised: an older version then refuses the file instead of reading codes as values."""
PEFT_VERSION = "0.21.2"
"""The version whose format is written; peft reads it to decide how to treat old files."""
LOADING = contextvars.ContextVar("loading", default=False)
"""True while `load` makes pieces: their first values are about to be overwritten and need not be computed."""


# -- writing -----------------------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str | Path, name: str = "default", *, quantise: str | None = None) -> Path:
    """Write the adapter `name` into `folder` (made if need be); returns the folder.

    Files are written beside their places and renamed, so a crash leaves the old adapter or the new one. `quantise`
    ("int8", "nf4") stores its matrices as codes, for Inlay only. Raises AdapterError when it is not loaded,
    CheckpointError when the disk is full, UnsupportedError for matrices that codes cannot stand for.
    """
    folder = Path(folder)
    adapter = engine.adapters_of(model).get(name)
    model = engine.base_model(model)
    index = SiteIndex(model)
    peft = peft_config(adapter, index) if quantise is None else None
    tensors, extra = _tensors(adapter, plain=peft is not None)
    tensors = tensors if peft is None else as_peft_writes(tensors)
    pairs = zip(adapter.methods, adapter.placed, strict=True)
    described: dict[str, Any] = {"methods": [_describe(method, placed, index) for method, placed in pairs]}
    tag = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]
    said: dict[str, str] = {}
    if quantise is not None:
        whole = [number for number, method in enumerate(adapter.methods) if isinstance(method, ModulesToSave)]
        chosen = codes.matrices(tensors, whole, [piece for _, piece in adapter.pieces()])
        tensors, said, report = codes.coded(tensors, codes.check_kind(quantise), chosen)
        tag, described["quantised"] = f"{tag}-{quantise}", dataclasses.asdict(report)
    config: dict[str, Any] = {
        "peft_type": "INLAY",
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
        **replication.file_entry(model),
        **(peft or {}),
        "auto_mapping": {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
            "inlay": {
                "format": 1 if quantise is None else FORMAT,
                "version": _version(),
                **described,
                "tag": tag,
                "extra": bool(extra),
                "base": fingerprint(model, _replaced(adapter)),
            },
        },
    }
    metadata = {"format": "pt", "inlay": tag}
    contents = {files.WEIGHTS: (owned(tensors), {**metadata, **said})}
    if extra:
        contents[files.EXTRA] = (owned(extra), metadata)
    files.write(folder, config, contents)
    return folder


def peft_config(adapter: engine.Adapter, index: SiteIndex) -> dict[str, Any] | None:
    """The fields of peft's config for this adapter, or None when peft has no such adapter.

    One method that peft has, with the heads and token rows that peft keeps inside the same file.
    """
    main = [m for m in adapter.methods if not isinstance(m, ModulesToSave) and not m.rides_with(adapter.methods)]
    adapted = {site.path for site, piece in adapter.pieces() if not piece.replaces}
    pairs = list(zip(adapter.methods, adapter.placed, strict=True))
    whole = {site.path for method, placed in pairs if isinstance(method, ModulesToSave) for site, _ in placed}
    kind = main[0].peft_type if len(main) == 1 and not adapted & whole else None
    if kind is None or not replication.peft_replicates(index.model, kind):
        return None
    config: dict[str, Any] = {
        "peft_type": kind,
        "peft_version": PEFT_VERSION,
        "task_type": task_type(index.model),
        "revision": None,
        **replication.file_entry(index.model),
    }
    for method, placed in pairs:
        try:
            config |= method.to_peft([site for site, _ in placed], index) | method.peft_state(placed)
        except UnsupportedError:
            return None
    return config


TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_type(model: nn.Module) -> str | None:
    """peft's name for what the model's class does, or None."""
    return next((kind for suffix, kind in TASK_TYPES.items() if type(model).__name__.endswith(suffix)), None)


def base_name(model: nn.Module) -> str | None:
    """What the base model was loaded from, as transformers remembers it."""
    config = getattr(model, "config", None)
    return getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None) or None


def _tensors(adapter: engine.Adapter, plain: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both files' tensors; in an adapter of several methods every key says which method it belongs to."""
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for number, (method, placed) in enumerate(zip(adapter.methods, adapter.placed, strict=True)):
        own, more = method.export(placed)
        tensors |= {key if plain else f"{number}.{key}": value for key, value in own.items()}
        extra |= {f"{number}.{key}": value for key, value in more.items()}
    return tensors, extra


def _describe(method: Method, placed: engine.Placed, index: SiteIndex) -> dict[str, Any]:
    """A method as JSON: its kind and fields, with places resolved to names so that they mean the same for ever."""
    if type(method).sites is Method.sites:
        # What its targets chose: not the copies, nor what it set at the model's entry of its own accord.
        sites = [site for site, piece in placed if not piece.replaces and site.kind in method.hosts]
        everything = [site.name for site in index.sites if site.kind in method.hosts]
        changes = [_changes(method, site) for site in sites]
        overrides: dict[str, Any] = {}
        for fields in (fields for number, fields in enumerate(changes) if fields and fields not in changes[:number]):
            places = {site.name for site, own in zip(sites, changes, strict=True) if own == fields}
            overrides |= dict.fromkeys(_exact_names(places, everything), fields)
        targets = _exact_names({site.name for site in sites}, everything)
        method = method.replace(targets=tuple(targets), exclude=None, layers=None, overrides=overrides)
    elif callable(method.targets):
        kind = type(method).__name__
        raise UnsupportedError(f"{kind} was given a callable as targets, which cannot be written to a file: name them")
    method = method.for_file()
    return {"kind": method.kind, **{field.name: getattr(method, field.name) for field in dataclasses.fields(method)}}


def _changes(method: Method, site: Site) -> dict[str, Any]:
    """The fields that overrides change at one site."""
    here = method.at(site)
    names = [field.name for field in dataclasses.fields(method)]
    return {name: getattr(here, name) for name in names if getattr(here, name) != getattr(method, name)}


def _exact_names(selected: set[str], everything: Sequence[str]) -> list[str]:
    """Targets that mean `selected` and nothing else of `everything`."""
    names = shortest_names(selected, everything)
    apart = set(ambiguous(names, selected, everything))
    return [f"re:{re.escape(name)}" if name in apart else f"name:{name}" for name in names]


def _replaced(adapter: engine.Adapter) -> frozenset[str]:
    """Parameters that the adapter brings along itself, whose values in the base do not matter."""
    return frozenset(site.name for site, piece in adapter.pieces() if piece.replaces)


def _version() -> str:
    try:
        return version("inlay")
    except PackageNotFoundError:
        return "0"


# -- reading -----------------------------------------------------------------------------------------------------------


def load(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    strict: bool = True,
) -> nn.Module:
    """Attach the adapter in `folder`, written by `save` or by HF peft; returns the same model.

    It becomes active only if no other adapter is loaded, and trainable only if asked. Raises CheckpointError for files
    that are missing, damaged or do not fit, and BaseModelError when the file was made for another base model
    (`strict=False` insists). The model is then as it was before.
    """
    folder = Path(folder)
    before = engine.find_adapters(model)
    active = before.state.active if before else ()
    with blaming(folder), replication.as_in(folder, engine.base_model(model)):
        index = SiteIndex(engine.base_model(model))
        file = read(folder, index, strict)
        adapter = make(engine.set_in, index, file, name)
        try:
            fill(index, adapter, file)
            engine.settle_training(model, adapter, trainable)
        except BaseException:
            engine.detach(model, name)
            raise
    if before and len(before.loaded) > 1:
        engine.activate(model, *active)
    return model


class File(NamedTuple):
    """An adapter folder, read."""

    folder: Path
    config: dict[str, Any]
    methods: list[Method]
    saved: tuple[str, ...]
    """Modules saved whole."""
    tensors: dict[str, Tensor]
    extra: dict[str, Tensor]


def read(folder: Path, index: SiteIndex, strict: bool) -> File:
    """What an adapter folder holds, as far as can be told without its pieces. Raises as `load` does."""
    config = files.read_config(folder)
    tensors, metadata = files.read_tensors(folder)
    methods, saved = read_methods(config, folder)
    own = own_entry(config)
    extra, extra_metadata = files.read_tensors(folder, files.EXTRA) if own.get("extra") else ({}, {})
    if own and not {metadata.get("inlay"), extra_metadata.get("inlay")} <= {None, own.get("tag")}:
        raise CheckpointError(f"{folder}: {files.CONFIG} and the tensors come from two saves; save it again")
    if own.get("base") and strict:
        compare(own["base"], index.model)
    if config.get("peft_type") != "INLAY":
        tensors, brought = brought_parameters(prefixed(tensors), index.model, saved, config)
        saved = (*_present(saved, tensors, own), *brought)
        methods = methods if own else [_without_idle_overrides(method, index) for method in methods]
    return File(folder, config, methods, saved, tensors, extra)


@contextlib.contextmanager
def blaming(folder: Path) -> Iterator[None]:
    """What goes wrong for want of a sensible value in the config is the file's fault."""
    try:
        yield
    except InlayError:
        raise
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{folder / files.CONFIG} has a value that cannot be used ({type(error).__name__}: {error}): restore the "
            "file, or save the adapter again"
        ) from error


def make(maker: Callable[..., engine.Adapter], index: SiteIndex, file: File, name: str) -> engine.Adapter:
    """What the file describes, by `maker`; places that are missing mean that it was made for another base."""
    token = LOADING.set(True)
    try:
        return maker(index, file.methods, name, file.saved)
    except TargetError as error:
        if own_entry(file.config):
            raise
        made_for = file.config.get("base_model_name_or_path") or "a base it does not name"
        raise BaseModelError(
            f"{file.folder} adapts target_modules={file.config.get('target_modules')!r} of {made_for}, which "
            f"{type(index.model).__name__} does not have: load it on the base it was made for"
        ) from error
    finally:
        LOADING.reset(token)


def own_entry(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Inlay wrote into a config for itself; empty in a file that HF peft wrote."""
    mapping = config.get("auto_mapping")
    own = mapping.get("inlay") if isinstance(mapping, dict) else None
    return own if isinstance(own, dict) else {}


def read_methods(config: Mapping[str, Any], folder: Path) -> tuple[list[Method], tuple[str, ...]]:
    """The methods that a config describes, and the modules saved whole."""
    own = own_entry(config)
    with blaming(folder):
        if not own:
            methods = _from_peft(config, folder)
        elif own.get("format", 0) > FORMAT:
            raise CheckpointError(
                f"{folder} was written by Inlay {own.get('version')} in format {own['format']}; this version reads up "
                f"to {FORMAT}: upgrade inlay"
            )
        else:
            methods = [make_method(entry["kind"], _fields(entry)) for entry in own["methods"]]
    modules = tuple(name for m in methods if isinstance(m, ModulesToSave) for name in m.modules)
    return [method for method in methods if not isinstance(method, ModulesToSave)], modules


def _fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples: lists become tuples, as frozen dataclasses hold them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items() if key != "kind"}


def _from_peft(config: Mapping[str, Any], folder: Path) -> list[Method]:
    kind = config.get("peft_type")
    readers: dict[str, Callable[[Mapping[str, Any]], Sequence[Method]]] = {
        cls.peft_type: cls.from_peft
        for cls in (*all_methods(), *over_adapters())
        if cls.peft_type and "peft_type" in cls.__dict__
    }
    if kind not in readers:
        raise CheckpointError(
            f"{folder / files.CONFIG} has peft_type={kind!r}, which is unknown here{did_you_mean(str(kind), readers)} "
            f"(known: {', '.join(sorted(readers))})"
        )
    return [*readers[kind](config), *ModulesToSave.from_peft(config)]


def _present(saved: Sequence[str], tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> list[str]:
    """Of the modules a config lists, those the file has: peft lists `classifier` and `score` whichever exists."""
    return [name for name in saved if own or any(f".{name}." in f".{key}" for key in tensors)]


def _without_idle_overrides(method: Method, index: SiteIndex) -> Method:
    """peft allows patterns that match nothing."""
    if not method.overrides:
        return method
    sites = method.sites(index)
    used = {pattern: fields for pattern, fields in method.overrides.items() if any(s.matches(pattern) for s in sites)}
    return method.replace(overrides=used)


def fill(index: SiteIndex, adapter: engine.Adapter, file: File) -> None:
    """Give every piece its tensors; a key left over, or missing, is an error that names it."""
    folder, config, extra = file.folder, file.config, file.extra
    tensors = dict(file.tensors)
    plain = config.get("peft_type") != "INLAY"
    found = _tensors(adapter, plain)[0]
    for key in found.keys() & tensors.keys():
        if found[key].is_floating_point() != tensors[key].is_floating_point():
            raise CheckpointError(
                f"{folder / files.WEIGHTS}: {key!r} holds {tensors[key].dtype}, where {found[key].dtype} is needed: "
                "the file is damaged, or not an adapter"
            )
    for number, (method, placed) in enumerate(zip(adapter.methods, adapter.placed, strict=True)):
        mine = tensors if plain else _numbered(tensors, number)
        method.import_(placed, mine, _numbered(extra, number))
        if not plain:
            tensors |= {f"{number}.{key}": value for key, value in mine.items()}
    if tensors:
        key = next(iter(tensors))
        raise CheckpointError(
            f"{folder / files.WEIGHTS} has {len(tensors)} tensors that nothing here takes, such as {key!r}"
            f"{did_you_mean(key, found)}"
        )
    if plain and own_entry(config):
        _same_twice(config, peft_config(adapter, index) or {}, folder)


def _same_twice(config: Mapping[str, Any], meant: Mapping[str, Any], folder: Path) -> None:
    """What our own part of a config says must be what peft's part says, or an edit by hand would go unnoticed."""
    meant = json.loads(json.dumps(meant))
    for field in meant.keys() & config.keys() - {"peft_version", "task_type", "revision", "modules_to_save"}:
        here, there = (sorted(v) if isinstance(v, list) else v for v in (config[field], meant[field]))
        if here != there:
            raise CheckpointError(
                f"{folder / files.CONFIG} says {field}={config[field]!r}, but its 'inlay' entry in auto_mapping means "
                f"{meant[field]!r}: it was edited by hand in one place only; undo that, or edit both"
            )


def _numbered(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Take out the tensors that belong to one method."""
    prefix = f"{number}."
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
