"""How HF peft's `adapter_config.json` and its files name places, from our sites and back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from inlay.engine.host import CHILD
from inlay.engine.walk import modules as modules_of
from inlay.errors import BaseModelError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inlay.engine.piece import Piece
    from inlay.engine.sites import Site, SiteIndex

PREFIX = "base_model.model."
"""What peft's keys start with, before the path of a module in the model."""
MULTIHEAD = r"(?:\.in_proj_weight|\.out_proj\.weight)?"
"""peft targets a whole nn.MultiheadAttention, which here is two parameter sites."""


# -- writing -----------------------------------------------------------------------------------------------------------


def peft_targets(sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
    """`target_modules` (and `target_parameters`) that select exactly these sites, as suffixes where they suffice.

    Raises UnsupportedError for a choice that peft cannot express: half of an nn.MultiheadAttention, a parameter of the
    model itself, or one that peft could not tell from another.
    """
    _whole_attentions(sites)
    modules = {site.owner or site.path for site in sites if site.owner is not None or site.parameter is None}
    everything = [path for path, _ in modules_of(index.model)]
    names = shortest_names(modules, everything)
    if ambiguous(names, modules, everything):
        fields: dict[str, Any] = {"target_modules": "|".join(re.escape(path) for path in sorted(modules))}
    else:
        fields = {"target_modules": names}
    parameters = [site for site in sites if site.owner is None and site.parameter is not None]
    if parameters:
        everything = [site.name for site in index.parameters()]
        selected = {site.name for site in parameters}
        names = shortest_names(selected, everything)
        if any(not site.path for site in parameters) or ambiguous(names, selected, everything):
            raise UnsupportedError(f"HF peft cannot target exactly the parameters {sorted(selected)}")
        fields["target_parameters"] = names
    return fields


def _whole_attentions(sites: Sequence[Site]) -> None:
    for owner in {site.owner for site in sites if site.owner is not None}:
        if {s.name for s in sites if s.owner == owner} != {f"{owner}.in_proj_weight", f"{owner}.out_proj.weight"}:
            raise UnsupportedError(f"HF peft adapts {owner} as a whole: in_proj_weight and out_proj together")


def shortest_names(selected: Iterable[str], everything: Iterable[str]) -> list[str]:
    """The shortest suffixes after a dot that match all of `selected` and nothing else of `everything`, sorted.

    A name that is itself a suffix of another one cannot be told apart so and is given whole: see `ambiguous`.
    """
    wanted = set(selected)
    taken = {suffix for name in everything if name not in wanted for suffix in _suffixes(name)}
    return sorted({next((suffix for suffix in _suffixes(name) if suffix not in taken), name) for name in wanted})


def ambiguous(names: Iterable[str], selected: Iterable[str], everything: Iterable[str]) -> list[str]:
    """Those of `names` that, read as suffixes after a dot, also match something that is not `selected`."""
    wanted = set(selected)
    taken = {suffix for name in everything if name not in wanted for suffix in _suffixes(name)}
    return [name for name in names if name in taken]


def _suffixes(name: str) -> Iterator[str]:
    """`c`, `b.c`, `a.b.c` for `a.b.c`."""
    parts = name.split(".")
    return (".".join(parts[-length:]) for length in range(1, len(parts) + 1))


def peft_pattern(values: Mapping[Site, Any], usual: Any) -> dict[str, Any]:
    """peft's rank_pattern or alpha_pattern: the places whose value is not the usual one, named as peft matches them."""
    named: dict[str, Any] = {}
    for site, value in values.items():
        name = site.owner or site.name
        if named.setdefault(name, value) != value:
            raise UnsupportedError(f"HF peft has one rank and alpha for all of {name}")
    pattern: dict[str, Any] = {}
    for value in {value for value in named.values() if value != usual}:
        selected = [name for name in named if named[name] == value]
        names = shortest_names(selected, named)
        apart = ambiguous(names, selected, named)
        pattern |= {f"^{re.escape(name)}" if name in apart else name: value for name in names}
    return dict(sorted(pattern.items()))


def file_paths(pieces: Sequence[tuple[Site, Piece]]) -> list[str]:
    """The path of each piece in a file of peft's, which wraps what it adapts.

    What lies in or below a wrapped module is under its `.base_layer`. Several parameters of one module are wrappers
    around wrappers, the first of them innermost.
    """
    wrappers = Counter(site.path for site, piece in pieces if not piece.replaces)
    seen: Counter[str] = Counter()
    paths = []
    for site, piece in pieces:
        own = wrappers[site.path]
        if not piece.replaces:
            seen[site.path] += 1
            own -= seen[site.path]
        paths.append(_wrapped(site.path, wrappers, own))
    return paths


def _wrapped(path: str, wrappers: Mapping[str, int], own: int) -> str:
    parts = path.split(".") if path else []
    spelled: list[str] = []
    for length in range(len(parts) + 1):
        above = ".".join(parts[:length])
        spelled += parts[length - 1 : length] if length else []
        spelled += ["base_layer"] * (own if above == path else wrappers.get(above, 0))
    return ".".join(spelled)


# -- reading -----------------------------------------------------------------------------------------------------------


def targets_from_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """`targets` (and `exclude`) with the meaning of a peft config: one pattern, since there names may match nothing.

    Read are target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, target_parameters.
    """
    names, parameters = config.get("target_modules"), config.get("target_parameters")
    left_out = _left_out(config)
    if isinstance(names, str) and names.lower() == "all-linear":
        if parameters:
            raise ConfigError("target_modules='all-linear' cannot be combined with target_parameters; name the modules")
        return {"targets": "all-linear"} | ({"exclude": [f"re:{left_out}"]} if left_out else {})
    patterns = []
    if names:
        within = "" if isinstance(names, str) else _layers(config)
        patterns.append(f"{f'(?!(?:{left_out})$)' if left_out else ''}{within}{_names(names)}{MULTIHEAD}")
    if parameters:
        patterns.append(_names(parameters))
    if not patterns:
        raise ConfigError("this adapter_config.json names no target_modules, so there is nothing to attach")
    return {"targets": ["re:" + "|".join(patterns)]}


def overrides_from_peft(config: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """`overrides` from peft's patterns; `fields` maps our field's name to the entry of the config."""
    overrides: dict[str, dict[str, Any]] = {}
    for ours, theirs in fields.items():
        for name, value in (config.get(theirs) or {}).items():
            overrides.setdefault(rf"re:(?:.*\.)?{_names(name)}{MULTIHEAD}", {})[ours] = value
    return overrides


def _names(names: Any) -> str:
    """A regular expression for peft's list of suffixes; its own regular expressions are strings."""
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ConfigError(f"the adapter's config has {names!r}, not a regular expression ({error})") from None
        return f"(?:{names})"
    return rf"(?:.*\.)?(?:{'|'.join(re.escape(name) for name in sorted(names))})"


def _left_out(config: Mapping[str, Any]) -> str:
    """What peft never adapts: excluded modules, and everything in a module that is saved whole."""
    excluded, saved = config.get("exclude_modules"), config.get("modules_to_save")
    patterns = [f"{_names(excluded)}{MULTIHEAD}"] if excluded else []
    patterns += [rf"{_names(saved)}(?:\..*)?"] if saved else []
    return "|".join(patterns)


def _layers(config: Mapping[str, Any]) -> str:
    """A lookahead for layers_to_transform: the first number in the path, or the one after a layers_pattern."""
    layers, stacks = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return ""
    wanted = "|".join(str(layer) for layer in ([layers] if isinstance(layers, int) else layers))
    if stacks:
        return rf"(?=(?:.*\.)?(?:{stacks if isinstance(stacks, str) else '|'.join(stacks)})\.(?:{wanted})\.)"
    return rf"(?=[^.]*\.[^.]*\.(?:(?!\d+\.)[^.]*\.)*(?:{wanted})\.)"


def prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys with peft's full prefix, which some files lack: those beside a prompt, and of models adapted in place."""
    if not _of_prompt(tensors) and any(key.startswith("base_model.") for key in tensors):
        return tensors
    return {f"{PREFIX}{key.removeprefix('base_model.')}" if "." in key else key: t for key, t in tensors.items()}


def as_peft_writes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Around a prompt peft has one wrapper less, so that modules saved with it are under `base_model.` alone."""
    if not _of_prompt(tensors):
        return tensors
    return {key.replace(PREFIX, "base_model.", 1): tensor for key, tensor in tensors.items()}


def _of_prompt(tensors: Mapping[str, Tensor]) -> bool:
    return any("." not in key for key in tensors)


def brought_parameters(
    tensors: Mapping[str, Tensor], base: nn.Module, saved: Sequence[str], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """The other tensors, and the modules of whole base parameters that peft wrote though no field says so.

    Such are embeddings, which peft adds when they are adapted or were resized, and modules whose name merely ends in
    one of modules_to_save. What the base has already is dropped; the rest is to be loaded as trained copies.
    """
    rest: dict[str, Tensor] = {}
    modules: list[str] = []
    for key, tensor in tensors.items():
        if ".original_module." in key or ".modules_to_save." in key:  # with bias="all", peft writes its own copies too
            continue
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        parameter, path = _own_parameter(base, name), name.rpartition(".")[0]
        named = any(f".{one}." in f".{name}" for one in saved)
        if parameter is None or named or (name.endswith("bias") and config.get("bias", "none") != "none"):
            rest[key] = tensor
        elif parameter.shape != tensor.shape:
            resize = f"; resize it first (model.resize_token_embeddings({tensor.shape[0]}))"
            raise BaseModelError(
                f"the adapter file brings its own {name} of shape {tuple(tensor.shape)}, and this base has one of "
                f"{tuple(parameter.shape)}: it was made for another base, or for this one resized"
                f"{resize if tensor.shape[1:] == parameter.shape[1:] else ''}"
            )
        elif not torch.equal(parameter.detach().cpu(), tensor.to(parameter.dtype)):
            rest[f"{PREFIX}{name}"] = tensor
            modules += [path] if path not in modules else []
    return rest, modules


def _own_parameter(base: nn.Module, name: str) -> Tensor | None:
    """The base's own parameter of this name, or None."""
    *path, last = name.split(".")
    module: nn.Module | None = base
    for child in path:
        module = module._modules.get(child) if module is not None and child != CHILD else None
    return None if module is None else module._parameters.get(last)
