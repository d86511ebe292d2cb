"""Invertible adapters of MAD-X (Pfeiffer et al. 2020, arXiv:2005.00052): a network after the embeddings, run backwards
before the output embedding.

    y₁ = x₁ + F(x₂),  y₂ = x₂ + G(y₁)           x = [x₁ ; x₂], what the embeddings give to the first block
    x₂ = y₂ − G(y₁),  x₁ = y₁ − F(x₂)           before the language-model head, where the model has one

With `coupling="glow"` F and G give factors too (GLOW, Kingma and Dhariwal 2018, arXiv:1807.03039):

    y₁ = e(s₂) ⊙ x₁ + t₂,  y₂ = e(s₁) ⊙ x₂ + t₁     [s₂ ; t₂] = F(x₂),  [s₁ ; t₁] = G(y₁),  log e(s) = 3.18 atan(s / 5)

F and G are bottlenecks of the halves; with `init="zero_up"` both start at zero, so the model starts as the base. It is
for another language: trained with adapters in the blocks, `attach(model, [InvertibleAdapter(), Adapter()])`.

Parameters: 2 d m + 2 m + d, m = d / 4 (half of a half) unless told otherwise. Width 768: 296,064. With
glow 3 d m + 2 m + 2 d: 444,288.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from inlay.engine.piece import Method, Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.sub_layers import SubLayers
from inlay.errors import ConfigError, TargetError, UnsupportedError
from inlay.methods.adapter import Adapter
from inlay.pieces.coupling import COUPLINGS, CouplingPiece, InversePiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvertibleAdapter(Method):
    """x ↦ [x₁ + F(x₂) ; x₂ + G(·)] after the embeddings, and its inverse before the output embedding."""

    kind = "invertible"
    hosts = frozenset({"linear", "module"})
    default_targets = "block"  # of these the first ones; and the language-model head
    paper = "Pfeiffer et al. 2020, arXiv:2005.00052"
    learning_rate: ClassVar[float] = 1e-4

    reduction_factor: float = 2
    """Width of a half over width of the bottlenecks F and G."""
    activation: str = "relu"
    """The function inside F and G: relu, gelu, silu, tanh, …"""
    init: Literal["zero_up", "bert", "houlsby"] = "zero_up"
    """How F and G start, as for `Adapter`."""
    coupling: Literal["nice", "glow"] = "nice"
    """nice: F and G are added; glow: they also multiply."""

    dropout: ClassVar[float] = 0.0  # a network with dropout has no inverse
    scale: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if self.coupling not in COUPLINGS:
            raise ConfigError(f"InvertibleAdapter(coupling={self.coupling!r}): choose one of {', '.join(COUPLINGS)}")
        try:
            Adapter(reduction_factor=self.reduction_factor, activation=self.activation, init=self.init)
        except ConfigError as error:
            raise ConfigError(str(error).replace("Adapter", "InvertibleAdapter", 1)) from None
        if self.layers is not None or self.overrides or (self.exclude is not None and self.targets is None):
            raise ConfigError(
                "InvertibleAdapter has no layers, no overrides, and exclude with targets only: it is one network"
            )

    def sites(self, index: SiteIndex) -> list[Site]:
        what = type(self).__name__
        if self.targets is not None:
            found = index.select(self.targets, hosts=self.hosts, exclude=self.exclude, what=what)
            if len(found) > 1:
                names = ", ".join(site.name for site in found[:3])
                raise TargetError(f"{what}: targets={self.targets!r} are {len(found)} places ({names}, …): name one")
            return found
        first = [site for site in index.sites if "block" in site.roles and site.layer == 0]
        if not first:
            raise TargetError(
                f"{what} has no place in {type(index.model).__name__}, where no stack of blocks was recognised; name "
                "the place that the embeddings go into with targets=..."
            )
        depth: Any = getattr(getattr(index.model, "config", None), "num_hidden_layers", None)
        if isinstance(depth, int) and depth > (first[0].depth or 0):
            raise UnsupportedError(
                f"{what} cannot sit at {first[0].path}: {type(index.model).__name__} calls it {depth} times, and not "
                "the embeddings alone go into it; name the place that they go into with targets=..."
            )
        heads = [site for site in index.sites if site.kind == "linear" and "lm_head" in site.roles]
        return [*first, *heads]

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        layers, made = SubLayers(SiteIndex(model), type(self).__name__), list[tuple[Site, Piece]]()
        widths = {site: layers.widths(site)[0] for site in sites}
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{site.name} {width}" for site, width in widths.items())
            raise UnsupportedError(
                f"{type(self).__name__}: one network serves all its places, and they differ in width ({listed}); "
                "name some of them with targets=..."
            )
        coupling = COUPLINGS[self.coupling](widths[sites[0]], self, sites[0])
        for number, site in enumerate(sites):
            inverse = self.targets is None and "block" not in site.roles
            made.append((site, (InversePiece if inverse else CouplingPiece)(coupling, owns=number == 0)))
        return made
