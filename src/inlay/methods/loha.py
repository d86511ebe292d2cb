"""LoHa: low-rank Hadamard product (Hyeon-Woo et al. 2021, arXiv:2108.06098, as FedPara; LyCORIS for diffusion).

    ΔW = s · (A₁ B₁) ⊙ (A₂ B₂),     s = alpha / r

The product of two matrices of rank r has rank up to r², and its factors are known: row by row, the Kronecker products
of those of A₁ and A₂, and of B₁ and B₂. Where r² is small beside the weight they run as a LoRA of that rank, and ΔW is
never formed. B₂ starts at zero, so the model starts as the base.

Parameters: 2 r (in + out); a convolution counts in as channels times kernel.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.pieces.linear import DeltaPiece, LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(LinearMethod):
    """ΔW = s · (A₁ B₁) ⊙ (A₂ B₂): twice LoRA's parameters, the square of its rank."""

    kind = "loha"
    hosts = frozenset({"linear", "conv"})
    default_targets = "query,value"
    peft_type = "LOHA"
    paper = "Hyeon-Woo et al. 2021, arXiv:2108.06098"
    peft_constants = (("rank_dropout", 0.0), ("module_dropout", 0.0), ("use_effective_conv2d", False))
    peft_conv1d = False
    peft_convolutions = frozenset({1, 2})

    r: int = named("r", 8, "rank_pattern")
    """Rank of each of the two products."""
    alpha: float = named("alpha", 8, "alpha_pattern")
    """Numerator of the scale s."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_number("alpha")

    def piece(self, site: Site) -> Piece:
        return LoHaPiece(self, site)


class LoHaPiece(DeltaPiece):
    """A₁, A₂ (out, r) and B₁, B₂ (r, in), by HF peft's names."""

    def __init__(self, method: LoHa, site: Site) -> None:
        super().__init__(method, site)
        (o, i), self.r, self.scale = self.shape, method.r, method.alpha / method.r
        self.hada_w1_a, self.hada_w1_b = self.start(o, self.r), self.start(self.r, i)
        self.hada_w2_a, self.hada_w2_b = self.start(o, self.r), self.start(self.r, i, value=0.0)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        if 4 * self.r**2 > min(self.shape):
            return None
        a = (self.hada_w1_b[:, None] * self.hada_w2_b[None]).flatten(0, 1)
        b = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]).flatten(1)
        return a, b, self.scale

    def form(self, *tensors: Tensor) -> Any:
        a1, b1, a2, b2 = tensors
        return self.scale * (a1 @ b1) * (a2 @ b2)
