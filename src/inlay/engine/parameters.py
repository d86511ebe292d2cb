"""Which parameters of the base a method trains, from what users write as targets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from inlay.engine.roles import known_role
from inlay.engine.sites import Site, SiteIndex, Targets
from inlay.engine.structure import ancestors
from inlay.engine.targets import split_items
from inlay.errors import TargetError, UnsupportedError, did_you_mean

KINDS = frozenset({"linear", "conv", "embedding", "attention", "norm", "parameter", "module"})
"""Every kind of place: parameters can be trained anywhere."""
BIAS = re.compile(r"(.*_)?bias|bias_[ih]h_l\d+(_reverse)?")
"""Names of parameters that are added to something: bias, in_proj_bias, down_proj_bias, bias_ih_l0."""


def is_bias(site: Site) -> bool:
    """Whether a parameter site is a bias, by its name."""
    return BIAS.fullmatch(site.parameter or "") is not None


def parameter_sites(
    index: SiteIndex, targets: Targets, *, exclude: Targets = None, layers: Any = None, what: str = ""
) -> list[Site]:
    """The parameters that `targets` names, in the model's order; None is every one.

    An item names parameters ("query.bias", "re:.*[.]weight") or places, which then stand for every parameter in them
    ("query", "mlp", "block"). Raises TargetError when an item, exclusion or layer matches nothing, or nothing is left,
    and UnsupportedError for the weights of recurrent layers.
    """
    chosen = _named(index, targets, what)
    if exclude is not None:
        left_out = {site.name for site in _named(index, exclude, what)}
        chosen = [site for site in chosen if site.name not in left_out]
    if layers is not None:
        inside = index.select(None, hosts=KINDS, layers=layers, what=what)
        wanted = {(site.layer, site.depth) for site in inside}
        chosen = [site for site in chosen if (site.layer, site.depth) in wanted]
    if not chosen:
        limits = f"targets={targets!r}, exclude={exclude!r}, layers={layers!r}"
        raise TargetError(f"{what}: no parameter of {type(index.model).__name__} is left with {limits}")
    for site in chosen:
        if isinstance(site.module, nn.RNNBase):
            raise UnsupportedError(
                f"{what}: {site.name} cannot be trained as a copy, because {type(site.module).__name__} reads its "
                f"weights from a flat list of its own; leave it out with exclude={site.path!r}"
            )
    return chosen


def with_tied(index: SiteIndex, sites: Iterable[Site]) -> list[Site]:
    """These parameters and every other place of the same tensors, so that what is tied stays tied."""
    wanted = {id(site.weight) for site in sites}
    return [site for site in index.parameters() if id(site.weight) in wanted]


def _named(index: SiteIndex, targets: Targets, what: str) -> list[Site]:
    parameters = index.parameters()
    if targets is None:
        return parameters
    if callable(targets):
        return _inside(parameters, index.select(targets, hosts=KINDS, what=what))
    names: set[str] = set()
    for item in split_items(targets):
        names |= {site.name for site in _item(index, parameters, item, what)}
    return [site for site in parameters if site.name in names]


def _item(index: SiteIndex, parameters: list[Site], item: str, what: str) -> list[Site]:
    role = known_role(item.removeprefix("role:"))
    is_role = item == "all-linear" or any(role in site.roles for site in index.sites)
    found = [] if is_role else [site for site in parameters if site.matches(item)]
    try:
        places = index.select(item, hosts=KINDS, what=what)
    except TargetError as error:
        if found:
            return found
        hint = "" if "did you mean" in str(error) else did_you_mean(item, [site.tail for site in parameters])
        raise TargetError(f"{error}{hint}") from None
    found += _inside(parameters, places)
    if not found:
        raise TargetError(f"{what}: what target {item!r} names has no parameters ({places[0].name!r}, …)")
    return found


def _inside(parameters: list[Site], places: list[Site]) -> list[Site]:
    """The parameters that are, or lie in, these places."""
    names = {site.name for site in places}
    modules = {site.path for site in places if site.parameter is None}
    return [
        site for site in parameters if site.name in names or any(above in modules for above in ancestors(site.path))
    ]
