"""How HF peft's `adapter_config.json` names places, from our sites and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inlay.errors import ConfigError

if TYPE_CHECKING:
    from inlay.engine.piece import Method
    from inlay.engine.sites import Site, SiteIndex

MULTIHEAD = r"(?:\.in_proj_weight|\.out_proj\.weight)?"
"""peft targets a whole nn.MultiheadAttention, which here is two parameter sites."""


def peft_targets(sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
    """`target_modules` (and `target_parameters`) that select exactly these sites, as suffixes where they suffice."""
    modules = {site.owner or site.path for site in sites if site.owner is not None or site.parameter is None}
    everything = [path for path, _ in index.model.named_modules()]
    fields: dict[str, Any] = {"target_modules": shortest_names(modules, everything)}
    parameters = [site.name for site in sites if site.owner is None and site.parameter is not None]
    if parameters:
        names = [site.name for site in index.parameters()]
        fields["target_parameters"] = shortest_names(parameters, names)
    return fields


def shortest_names(selected: Iterable[str], everything: Iterable[str]) -> list[str]:
    """The shortest suffixes after a dot that match all of `selected` and nothing else of `everything`, sorted."""
    wanted = set(selected)
    others = [name for name in everything if name not in wanted]
    names: set[str] = set()
    for name in sorted(wanted):
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            suffix = ".".join(parts[-length:])
            if length == len(parts) or not any(other == suffix or other.endswith(f".{suffix}") for other in others):
                names.add(suffix)
                break
    return sorted(names)


def peft_overrides(method: Method, sites: Sequence[Site], field: str) -> dict[str, Any]:
    """peft's rank_pattern and alpha_pattern: the sites whose value of `field` is not the method's own."""
    usual = getattr(method, field)
    found = {site.name: getattr(method.at(site), field) for site in sites}
    return {name: value for name, value in found.items() if value != usual}


def targets_from_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """`targets` and `exclude` with the meaning of peft's fields: one pattern, since there unmatched names are allowed."""
    targets = _pattern(config.get("target_modules"))
    parameters = config.get("target_parameters")
    if parameters:
        pattern = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, parameters))})"
        targets = f"re:{pattern}" if targets is None else f"{_as_pattern(targets)}|{pattern}"
    if targets is None:
        raise ConfigError("this adapter_config.json names no target_modules, so there is nothing to attach")
    fields: dict[str, Any] = {"targets": targets if targets == "all-linear" else [targets]}
    exclude = _pattern(config.get("exclude_modules"))
    if exclude is not None:
        fields["exclude"] = [exclude]
    return fields


def peft_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """`layers` from peft's layers_to_transform."""
    layers = config.get("layers_to_transform")
    return {} if layers is None else {"layers": [layers] if isinstance(layers, int) else list(layers)}


def _pattern(names: Any) -> str | None:
    if not names:
        return None
    if names == "all-linear":
        return "all-linear"
    if isinstance(names, str):
        return f"re:(?:{names}){MULTIHEAD}"
    return rf"re:(?:.*\.)?(?:{'|'.join(re.escape(name) for name in sorted(names))}){MULTIHEAD}"


def _as_pattern(target: str) -> str:
    if target == "all-linear":
        raise ConfigError("target_modules='all-linear' cannot be combined with target_parameters; name the modules")
    return target
