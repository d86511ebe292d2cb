"""Where a model's attentions and feed-forward networks begin and end, for methods that act on whole sub-layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from inlay.engine.parameters import parameter_sites
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.structure import ancestors
from inlay.errors import TargetError, UnsupportedError


class Pair(NamedTuple):
    """A feed-forward network that is no module of its own: the module that holds both projections, and the first."""

    holder: Site
    first: Site


class SubLayers:
    """The sub-layers of one model, by the roles of its places."""

    def __init__(self, index: SiteIndex, what: str = "Adapter") -> None:
        self.index = index
        self.what = what  # begins the error messages
        self.named = index.by_name()
        self.blocks = {site.path for site in index.sites if "block" in site.roles}
        self.post_norms = {self.block(s.path): s for s in index.sites if {"ffn_norm", "post_norm"} <= s.roles}

    def block(self, path: str) -> str | None:
        """The path of the innermost block around a path."""
        return next((above for above in ancestors(path) if above in self.blocks), None)

    def places(self, placement: str) -> list[Site]:
        """The places that a placement of `Adapter` takes when no targets are given. TargetError where none is found."""
        places = self.feed_forwards()
        if placement == "pfeiffer":
            places = [self.post_norms.get(self.block(site.path), site) for site in places]
        if placement == "houlsby":
            places += self.attention_outputs()
        if not places:
            raise TargetError(
                f"{self.what}(placement={placement!r}): no feed-forward network was recognised in "
                f"{type(self.index.model).__name__}; name the places with targets=... (`inlay show MODEL` lists them)"
            )
        return places

    def feed_forwards(self) -> list[Site]:
        """Each feed-forward network: its module, or its second projection where it is no module of its own."""
        modules = [site for site in self.index.sites if "mlp" in site.roles]
        paths = {site.path for site in modules}
        seconds = (site for site in self.index.sites if site.kind == "linear" and "down" in site.roles)
        return modules + [site for site in seconds if paths.isdisjoint(ancestors(site.path))]

    def attention_outputs(self) -> list[Site]:
        """The output projection of every attention; nn.MultiheadAttention itself, which never calls its own."""
        found = [site for site in self.index.sites if "output" in site.roles and site.kind in ("linear", "parameter")]
        return list(dict.fromkeys(self.named[site.owner] if site.owner is not None else site for site in found))

    def pair(self, last: Site) -> Pair | None:
        """What belongs to the second projection of a feed-forward network; None for any other place."""
        if last.kind != "linear" or "down" not in last.roles:
            return None
        block = self.block(last.path)
        ups = (site for site in self.index.sites if site.kind == "linear" and "up" in site.roles)
        firsts = [site for site in ups if self.block(site.path) == block]
        if not firsts:
            raise UnsupportedError(
                f"{self.what}(placement='parallel'): {last.name} has no first projection beside it that is known; "
                "name the places with targets=..."
            )
        first = max(firsts, key=lambda site: len(_holder(site.path, last.path)))
        return Pair(self.named[_holder(first.path, last.path)], first)

    def widths(self, site: Site) -> tuple[int, int]:
        """How many features go into a place and come out of it."""
        if isinstance(site.module, nn.GroupNorm | nn.modules.batchnorm._NormBase):
            raise UnsupportedError(
                f"{self.what} cannot sit at {site.name}: {type(site.module).__name__} has its channels on the second "
                "axis, and a bottleneck works on the last one; use another method there"
            )
        if site.kind != "module":
            return site.in_features, site.out_features
        weights = (s for s in self.index.sites if s.kind in ("linear", "parameter"))
        inside = [s for s in weights if s.name.startswith(f"{site.path}.")]
        seconds = [s for s in inside if "down" in s.roles]
        if not seconds:
            raise UnsupportedError(
                f"{self.what}: the width of what comes out of {site.name} ({type(site.module).__name__}) is not known; "
                "target the linear that computes it"
            )
        firsts = [s.in_features for s in inside if "up" in s.roles]
        return (firsts or [seconds[-1].out_features])[0], seconds[-1].out_features

    def norms(self, layers: Any = None) -> Sequence[Site]:
        """The parameters of every normalisation layer outside the heads (of those layers only)."""
        sites = parameter_sites(self.index, "norm", layers=layers, what=f"{self.what}(train_norms=True)")
        return [site for site in sites if "head" not in site.roles]


def _holder(one: str, other: str) -> str:
    """The path of the innermost module that holds both places."""
    around = set(ancestors(one))
    return next(above for above in ancestors(other) if above in around)
