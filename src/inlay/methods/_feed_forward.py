"""Where a model's feed-forward networks and attentions end, for methods that act on whole sub-layers."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from typing import Any, NamedTuple

from inlay.engine.sites import Site, SiteIndex
from inlay.engine.structure import ancestors
from inlay.errors import TargetError, UnsupportedError
from inlay.methods._parameters import parameter_sites


class FeedForward(NamedTuple):
    """A feed-forward network that is no module of its own: the module that holds it, and its first projection."""

    holder: Site
    first: Site


def adapted_places(index: SiteIndex, placement: str) -> list[Site]:
    """The places that a placement of `Adapter` takes when no targets are given. TargetError where none is recognised."""
    places = feed_forwards(index)
    if placement == "pfeiffer":
        places = [post_norm(index, site) or site for site in places]
    if placement == "houlsby":
        places += attention_outputs(index)
    if not places:
        raise TargetError(
            f"Adapter(placement={placement!r}): no feed-forward network was recognised in {type(index.model).__name__}; "
            "name the places with targets=... (`inlay show MODEL` lists every place and role)"
        )
    return places


def feed_forwards(index: SiteIndex) -> list[Site]:
    """Each feed-forward network's place of output: its module, or its second projection where it is none of its own."""
    modules = [site for site in index.sites if "mlp" in site.roles]
    paths = {site.path for site in modules}
    alone = [
        site
        for site in index.sites
        if site.kind == "linear" and "down" in site.roles and paths.isdisjoint(ancestors(site.path))
    ]
    return modules + alone


def attention_outputs(index: SiteIndex) -> list[Site]:
    """The output projection of every attention; nn.MultiheadAttention itself, which never calls its own."""
    named = index.by_name()
    found = [site for site in index.sites if "output" in site.roles and site.kind in ("linear", "parameter")]
    return list(dict.fromkeys(named[site.owner] if site.owner is not None else site for site in found))


def post_norm(index: SiteIndex, site: Site) -> Site | None:
    """The norm that follows the residual addition after a feed-forward network, where the block has one."""
    block = block_of(index, site.path)
    norms = (s for s in index.sites if {"ffn_norm", "post_norm"} <= s.roles and block_of(index, s.path) == block)
    return next(norms, None) if block is not None else None


def block_of(index: SiteIndex, path: str) -> str | None:
    """The path of the innermost block around a path."""
    blocks = {site.path for site in index.sites if "block" in site.roles}
    return next((above for above in ancestors(path) if above in blocks), None)


def between(index: SiteIndex, last: Site) -> FeedForward | None:
    """The first projection that belongs to a second one, and the module that holds both; None for other places."""
    if last.kind != "linear" or "down" not in last.roles:
        return None
    firsts = [
        site
        for site in index.sites
        if site.kind == "linear" and "up" in site.roles and block_of(index, site.path) == block_of(index, last.path)
    ]
    if not firsts:
        raise UnsupportedError(
            f"Adapter(placement='parallel'): no first projection was found for {last.name}; name the places with targets=..."
        )
    first = max(firsts, key=lambda site: len(_common(site.path, last.path)))
    return FeedForward(index.by_name()[_common(first.path, last.path)], first)


def widths(index: SiteIndex, site: Site) -> tuple[int, int]:
    """How many features go into a place and come out of it."""
    if site.kind != "module":
        return site.in_features, site.out_features
    inside = [s for s in index.sites if s.kind in ("linear", "parameter") and s.name.startswith(f"{site.path}.")]
    last = [s for s in inside if "down" in s.roles]
    if not last:
        raise UnsupportedError(
            f"Adapter: the width of what comes out of {site.name} ({type(site.module).__name__}) is not known; target the "
            "linear that computes it"
        )
    first = [s for s in inside if "up" in s.roles] or last
    return first[0].in_features if first is not last else last[-1].out_features, last[-1].out_features


def norms(index: SiteIndex, layers: Any = None) -> list[Site]:
    """The parameters of every normalisation layer outside the heads (of those layers only)."""
    sites: Sequence[Site] = parameter_sites(index, "norm", layers=layers, what="Adapter(train_norms=True)")
    return [site for site in sites if "head" not in site.roles]


def _common(one: str, other: str) -> str:
    """The path of the innermost module that holds both."""
    return os.path.commonprefix([f"{one}.".split("."), f"{other}.".split(".")]) and ".".join(
        a for a, b in zip(one.split("."), other.split("."), strict=False) if a == b
    )
