"""Bottleneck adapters: a small network of two linears beside, or after, a frozen sub-layer.

    A(x) = s · W_up f(W_down x + b_down) + b_up · s        W_down (m, d), W_up (d, m)

    houlsby    h + A(h) on the output of every attention and every feed-forward network, before the residual addition;
               the LayerNorms are trained too (Houlsby et al. 2019, arXiv:1902.00751)
    pfeiffer   one after each feed-forward network. With the norm after the residual addition, that norm runs twice:
               LN(t + A(LN(t))), t = h + residual; else h + A(h) (Pfeiffer et al. 2020, arXiv:2005.00247)
    parallel   h + A(x), x what goes into the feed-forward network (He et al. 2021, arXiv:2110.04366; s = 4 there)

With `init="zero_up"` W_up and b_up start at zero, so the model starts as the base. The adapter sees h after the dropout
that a feed-forward module ends with, where it has one.

Parameters: m · (d_in + d_out) + m + d_out for each place, m = d / 16 unless given. BERT-base: pfeiffer 894,528; houlsby
with m = 64: 2,379,264, and 38,400 in all of its 25 LayerNorms (the embeddings' included).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.sub_layers import SubLayers
from inlay.engine.trained_copy import copies
from inlay.pieces.bottlenecks import bottleneck as pieces
from inlay.pieces.bottlenecks.bottleneck import ACTIVATIONS, INITS, Bottleneck
from inlay.pieces.checks import CheckedMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter(CheckedMethod):
    """h + W_up f(W_down h): a bottleneck after attention and feed-forward, after feed-forward, or parallel to it."""

    kind = "adapter"
    hosts = frozenset({"linear", "norm", "attention", "module"})
    default_targets = "down"  # in a few words: `SubLayers.places` finds them
    paper = "Houlsby et al. 2019, arXiv:1902.00751"
    learning_rate: ClassVar[float] = 3e-4
    inits: ClassVar[tuple[str, ...]] = INITS

    placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """Where the bottleneck stands. With `targets`, at the output of those places (parallel: beside them)."""
    bottleneck: int | None = None
    """Width m of the bottleneck; None divides the width of the place by `reduction_factor`."""
    reduction_factor: float = 16
    """Width of the place over width of the bottleneck."""
    activation: str = "relu"
    """The function f: relu, gelu, silu, tanh, …"""
    init: Literal["zero_up", "bert", "houlsby"] = "zero_up"
    """zero_up: Kaiming W_down, zero W_up; bert: both N(0, 0.02²); houlsby: both N(0, 0.01²), cut off at ±0.02."""
    scale: float = 1.0
    """The factor s."""
    dropout: float = 0.0
    """Probability of zeroing an entry of the bottleneck, in training."""
    train_norms: bool | None = None
    """Train the normalisation layers too; None: with houlsby only."""

    def __post_init__(self) -> None:
        self.check_choice("placement", ("houlsby", "pfeiffer", "parallel"))
        self.check_whole("bottleneck")
        self.check_positive("reduction_factor")
        self.check_choice("activation", ACTIVATIONS)
        self.check_choice("init", self.inits)
        self.check_rate("dropout")

    def sites(self, index: SiteIndex) -> list[Site]:
        targets = self.targets
        if targets is None:
            places = {id(site) for site in SubLayers(index, type(self).__name__).places(self.placement)}
            targets = lambda site: id(site) in places  # noqa: E731
        found = index.select(
            targets, hosts=self.hosts, exclude=self.exclude, layers=self.layers, what=type(self).__name__
        )
        train_norms = self.placement == "houlsby" if self.train_norms is None else self.train_norms
        return [*found, *SubLayers(index, type(self).__name__).norms(self.layers)] if train_norms else found

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        layers = SubLayers(SiteIndex(model), type(self).__name__)
        made: list[tuple[Site, Piece]] = []
        for site in sites:
            if site.kind == "parameter":
                continue
            method = self.at(site)
            assert isinstance(method, Adapter)
            pair = layers.pair(site) if self.placement == "parallel" and self.targets is None else None
            if pair is not None:
                made += pieces.paired(method.network(pair.first.in_features, site.out_features, site), *pair, site)
                continue
            into, out = layers.widths(site)
            network = method.network(into if self.placement == "parallel" else out, out, site)
            if self.placement == "parallel":
                made.append((site, pieces.BesidePiece(network)))
            else:
                made.append((site, (pieces.TwicePiece if site.kind == "norm" else pieces.AfterPiece)(network)))
        return made + copies(site for site in sites if site.kind == "parameter")

    def network(self, into: int, out: int, site: Site) -> Bottleneck:
        """A fresh bottleneck from `into` to `out` features, on the device of a place."""
        width = self.bottleneck or max(1, int(out // self.reduction_factor))
        return Bottleneck(into, width, out, self, site)

    def file_key(self, site: Site, name: str) -> str:
        return f"base_model.model.{site.name}" if not name else super().file_key(site, name)
