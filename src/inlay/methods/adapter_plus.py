"""Adapter+: a bottleneck after each block, scaled channel by channel (Steitz, Roth 2024, arXiv:2406.06820).

    x + s ⊙ (W_up f(W_down x + b_down) + b_up)          x what comes out of a block, after its last residual addition

s (d) is trained and starts at one. With `init="zero_up"` W_up and b_up start at zero, so the model starts as the base;
the authors start both matrices from N(0, 0.01²), cut off at ±0.02 (`init="houlsby"`).

Parameters: 2 m d + m + 2 d for each block. ViT-B/16 at m = 8: 165,984.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from inlay.engine.piece import Method, Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.sub_layers import SubLayers
from inlay.errors import ConfigError
from inlay.methods.adapter import Adapter
from inlay.pieces.bottlenecks.bottleneck import AfterPiece
from inlay.pieces.bottlenecks.scaled import ScaledBottleneck


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterPlus(Method):
    """x + s ⊙ W_up f(W_down x) after each block, s one trained number a channel: made for vision transformers."""

    kind = "adapter_plus"
    hosts = frozenset({"linear", "norm", "attention", "module"})
    default_targets = "role:block"
    paper = "Steitz, Roth 2024, arXiv:2406.06820"
    learning_rate: ClassVar[float] = 1e-3

    bottleneck: int = 8
    """Width m of the bottleneck."""
    activation: str = "gelu"
    """The function f: relu, gelu, silu, tanh, …"""
    init: Literal["zero_up", "bert", "houlsby"] = "zero_up"
    """zero_up: Kaiming W_down, zero W_up; bert: both N(0, 0.02²); houlsby: both N(0, 0.01²), cut off at ±0.02."""
    dropout: float = 0.0
    """Probability of zeroing an entry of the bottleneck, in training."""
    drop_path: float = 0.1
    """Probability of leaving the last block's adapter out of an example, in training; it grows by block from 0."""

    scale: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        try:
            Adapter(bottleneck=self.bottleneck, activation=self.activation, init=self.init, dropout=self.dropout)
        except ConfigError as error:
            raise ConfigError(str(error).replace("Adapter", "AdapterPlus", 1)) from None
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"AdapterPlus(drop_path={self.drop_path!r}): a probability in [0, 1) is needed")

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        layers, made = SubLayers(SiteIndex(model), type(self).__name__), list[tuple[Site, Piece]]()
        for site in sites:
            method = self.at(site)
            assert isinstance(method, AdapterPlus)
            width = layers.widths(site)[1]
            share = 1.0 if site.layer is None or not site.depth or site.depth == 1 else site.layer / (site.depth - 1)
            network = ScaledBottleneck(width, method.bottleneck, width, method, site, share * method.drop_path)
            made.append((site, AfterPiece(network)))
        return made
