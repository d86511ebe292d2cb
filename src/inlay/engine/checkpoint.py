"""To disk and back, in the ecosystem's format: `adapter_config.json` + `adapter_model.safetensors`, as HF peft writes them.

A method that peft has is written exactly as peft would; anything else, and any combination, gets `"peft_type": "INLAY"`,
which peft refuses by name instead of reading wrongly. Either way `auto_mapping`, the one free-form entry of peft's
config (any other key would make peft warn), has an `"inlay"` part: the methods with their fields, the version, and a
fingerprint of the base model. Neither reading nor writing needs peft or a network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from inlay.engine import adapters as engine
from inlay.engine import files
from inlay.engine.fingerprint import compare, fingerprint
from inlay.engine.peft_names import shortest_names
from inlay.engine.piece import Method
from inlay.engine.registry import all_methods, make_method
from inlay.engine.sites import SiteIndex
from inlay.engine.trained_copy import ModulesToSave
from inlay.errors import CheckpointError, UnsupportedError, did_you_mean

FORMAT = 1
PEFT_VERSION = "0.21.2"
"""The version whose format is written; peft reads it to decide how to treat old files."""
PREFIX = "base_model."


# -- writing -----------------------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str | Path, name: str = "default") -> Path:
    """Write the adapter `name` into `folder` (made if need be); returns the folder.

    Files are written beside their places and renamed, so a crash leaves the old adapter or the new one. Raises
    AdapterError when it is not loaded, CheckpointError when the disk is full.
    """
    folder = Path(folder)
    adapter = engine.adapters_of(model).get(name)
    model = engine.base_model(model)
    index = SiteIndex(model)
    peft = peft_config(adapter, index, model)
    tensors, extra = _tensors(adapter, plain=peft is not None)
    pairs = zip(adapter.methods, adapter.placed, strict=True)
    described = {"methods": [_describe(method, placed, index) for method, placed in pairs]}
    tag = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]
    config: dict[str, Any] = {
        "peft_type": "INLAY",
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
        **(peft or {}),
        "auto_mapping": {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
            "inlay": {
                "format": FORMAT,
                "version": _version(),
                **described,
                "tag": tag,
                "base": fingerprint(model, _replaced(adapter)),
            },
        },
    }
    metadata = {"format": "pt", "inlay": tag}
    contents = {files.WEIGHTS: (_own(tensors), metadata)}
    if extra:
        contents[files.EXTRA] = (_own(extra), metadata)
    files.write(folder, config, contents)
    return folder


def peft_config(adapter: engine.Adapter, index: SiteIndex, model: nn.Module) -> dict[str, Any] | None:
    """The fields of peft's config for this adapter, or None when peft has no such adapter.

    One method that peft has, with the heads and token rows that peft keeps inside the same file.
    """
    main = [m for m in adapter.methods if not isinstance(m, ModulesToSave) and not m.rides_with(adapter.methods)]
    if len(main) != 1 or main[0].peft_type is None:
        return None
    config: dict[str, Any] = {
        "peft_type": main[0].peft_type,
        "peft_version": PEFT_VERSION,
        "task_type": task_type(model),
        "revision": None,
    }
    for method, placed in zip(adapter.methods, adapter.placed, strict=True):
        try:
            config |= method.to_peft([site for site, _ in placed], index)
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
    return getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _tensors(adapter: engine.Adapter, plain: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both files' tensors; in an adapter of several methods every key says which method it belongs to."""
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for number, (method, placed) in enumerate(zip(adapter.methods, adapter.placed, strict=True)):
        own, more = method.export(placed)
        tensors |= {key if plain else f"{number}.{key}": value for key, value in own.items()}
        extra |= {f"{number}.{key}": value for key, value in more.items()}
    return tensors, extra


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, unshared copies where needed: the file format has no aliases."""
    seen: set[int] = set()
    owned: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        owned[key] = tensor.clone() if pointer in seen or tensor.storage_offset() else tensor
        seen.add(pointer)
    return owned


def _describe(method: Method, placed: engine.Placed, index: SiteIndex) -> dict[str, Any]:
    """A method as JSON: its kind and fields, with the targets resolved to names so that they mean the same for ever."""
    if type(method).sites is Method.sites:
        sites = {site.name for site, piece in placed if not piece.replaces}
        names = shortest_names(sites, (site.name for site in index.sites if site.kind in method.hosts))
        method = method.replace(targets=tuple(f"name:{name}" for name in names), exclude=None, layers=None)
    elif callable(method.targets):
        raise UnsupportedError(f"{type(method).__name__} was given a callable as targets and cannot be written; name them")
    method = method.for_file()
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {"kind": method.kind, **fields}


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
    config = files.read_config(folder)
    tensors, metadata = files.read_tensors(folder)
    methods, saved = read_methods(config, folder)
    own = own_entry(config)
    if own and metadata.get("inlay") not in (None, own.get("tag")):
        raise CheckpointError(f"{folder}: {files.CONFIG} and {files.WEIGHTS} come from two different saves; save it again")
    extra = files.read_tensors(folder, files.EXTRA)[0] if (folder / files.EXTRA).is_file() else {}
    before = engine.find_adapters(model)
    active = before.state.active if before else ()
    if own.get("base") and strict:
        compare(own["base"], engine.base_model(model), _keys_without_prefix(tensors))
    engine.attach(model, methods, name, modules_to_save=_present(saved, tensors, own))
    try:
        _fill(engine.adapters_of(model).get(name), tensors, extra, plain=config.get("peft_type") != "INLAY", folder=folder)
    except BaseException:
        engine.detach(model, name)
        raise
    if before and len(before.loaded) > 1:
        engine.activate(model, *active)
    if not trainable:
        for parameter in engine.adapters_of(model).get(name).parameters():
            parameter.requires_grad_(False)
    return model


def own_entry(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Inlay wrote into a config for itself; empty in a file that HF peft wrote."""
    mapping = config.get("auto_mapping")
    own = mapping.get("inlay") if isinstance(mapping, dict) else None
    return own if isinstance(own, dict) else {}


def read_methods(config: Mapping[str, Any], folder: Path) -> tuple[list[Method], tuple[str, ...]]:
    """The methods that a config describes, and the modules saved whole."""
    own = own_entry(config)
    if own:
        if own.get("format", 0) > FORMAT:
            raise CheckpointError(
                f"{folder} was written by Inlay {own.get('version')} in format {own['format']}; this version reads up to "
                f"{FORMAT}: upgrade inlay"
            )
        try:
            methods = [make_method(entry["kind"], _fields(entry)) for entry in own["methods"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / files.CONFIG} has a damaged 'inlay' entry in auto_mapping ({error!r})") from None
    else:
        methods = _from_peft(config, folder)
    modules = tuple(name for m in methods if isinstance(m, ModulesToSave) for name in m.modules)
    return [method for method in methods if not isinstance(method, ModulesToSave)], modules


def _fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples: lists become tuples, as frozen dataclasses hold them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items() if key != "kind"}


def _from_peft(config: Mapping[str, Any], folder: Path) -> list[Method]:
    kind = config.get("peft_type")
    readers: dict[str, Callable[[Mapping[str, Any]], Sequence[Method]]] = {
        cls.peft_type: cls.from_peft for cls in all_methods() if cls.peft_type and "from_peft" in cls.__dict__
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


def _keys_without_prefix(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    return frozenset(key.split("base_model.model.", 1)[-1] for key in tensors)


def _fill(adapter: engine.Adapter, tensors: dict[str, Tensor], extra: dict[str, Tensor], plain: bool, folder: Path) -> None:
    """Give every piece its tensors; a key left over, or missing, is an error that names it."""
    if plain and not any(key.startswith(PREFIX) for key in tensors):
        # Models adapted in place by other libraries write keys without the wrapper's prefix.
        bare = {key for key in tensors if "." in key}
        tensors = {f"base_model.model.{key}" if key in bare else key: value for key, value in tensors.items()}
    for number, (method, placed) in enumerate(zip(adapter.methods, adapter.placed, strict=True)):
        mine = tensors if plain else _numbered(tensors, number)
        more = _numbered(extra, number)
        method.import_(placed, mine, more)
        if not plain:
            tensors |= {f"{number}.{key}": value for key, value in mine.items()}
    if tensors:
        found = {key for method, placed in zip(adapter.methods, adapter.placed, strict=True) for key in method.export(placed)[0]}
        key = next(iter(tensors))
        raise CheckpointError(
            f"{folder / files.WEIGHTS} has {len(tensors)} tensors that nothing here takes, such as {key!r}"
            f"{did_you_mean(key, found)}"
        )


def _numbered(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Take out the tensors that belong to one method."""
    prefix = f"{number}."
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}

