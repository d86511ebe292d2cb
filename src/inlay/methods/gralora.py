"""GraLoRA: granular low-rank adaptation (Jung et al. 2025, arXiv:2505.20355).

    W′ = W + s · [B_jn A_jn] + s · B A,     s = alpha / (r + hybrid_r)

W is cut into a grid of k × k blocks, each with a low-rank change of its own of rank r / k: the parameters and the cost
of LoRA at rank r, at a rank of up to k r. B A is a plain LoRA of rank `hybrid_r` beside it. B starts at zero, so the
model starts as the base.

Parameters: (r + hybrid_r) (in + out).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.kernels import grids, lora
from inlay.pieces.linear import DeltaPiece, LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraLoRA(LinearMethod):
    """ΔW is a grid of k × k blocks of rank r / k: LoRA's parameters, k times its rank."""

    kind = "gralora"
    default_targets = "query,value"
    peft_type = "GRALORA"
    paper = "Jung et al. 2025, arXiv:2505.20355"
    peft_constants = (("bias", "none"),)

    r: int = named("r", 32)
    """Rank of the k blocks of one column or one row together; k divides it."""
    k: int = named("gralora_k", 2)
    """Blocks along each side of W; it divides both."""
    alpha: float = named("alpha", 64)
    """Numerator of the scale s."""
    hybrid_r: int = named("hybrid_r", 0)
    """Rank of a plain LoRA beside the grid."""
    dropout: float = named("gralora_dropout", 0.0)
    """Probability of dropping an entry of the input before the change."""

    def __post_init__(self) -> None:
        self.check_whole("r", "k")
        self.check_whole("hybrid_r", least=0)
        self.check_number("alpha")
        self.check_rate("dropout")
        if self.r % self.k:
            raise ConfigError(f"GraLoRA(r={self.r}, k={self.k}): k has to divide r, so that each block has a rank")

    def piece(self, site: Site) -> Piece:
        if site.in_features % self.k or site.out_features % self.k:
            sides = f"{site.out_features} by {site.in_features}"
            raise UnsupportedError(f"GraLoRA cannot sit at {site.name}: k={self.k} does not divide both of {sides}")
        return GraLoRAPiece(self, site)


class GraLoRAPiece(DeltaPiece):
    """A (k, in / k, r) and B (k, r, out / k) of the grid, and those of the plain LoRA, by HF peft's names."""

    def __init__(self, method: GraLoRA, site: Site) -> None:
        super().__init__(method, site)
        (o, i), r, k, self.hybrid_r = self.shape, method.r, method.k, method.hybrid_r
        self.scale = method.alpha / (r + self.hybrid_r)
        start = self.start(k * r, i // k).data.view(k, r, i // k)
        self.gralora_A, self.gralora_B = nn.Parameter(start.mT.contiguous()), self.start(k, r, o // k, value=0.0)
        if self.hybrid_r:
            self.gralora_A_general = nn.ParameterDict({"weight": self.start(self.hybrid_r, i)})
            self.gralora_B_general = nn.ParameterDict({"weight": self.start(o, self.hybrid_r, value=0.0)})

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rate = self.dropout if self.training else 0.0
        if self.hybrid_r:
            a, b = self.gralora_A_general["weight"], self.gralora_B_general["weight"]
            y = lora.adapted(inner, x, a, b, self.scale, rate)
        else:
            y = inner(x)
        return grids.exchanged(y, F.dropout(x, rate) if rate else x, self.scale * self.gralora_A, self.gralora_B)

    def form(self, *tensors: Tensor) -> Tensor:
        a, b, *plain = tensors
        delta = grids.exchanged_delta(a, b)
        return self.scale * (delta + plain[1] @ plain[0] if plain else delta)
