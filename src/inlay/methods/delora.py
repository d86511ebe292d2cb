"""DeLoRA: decoupled low-rank adaptation (Bini et al. 2025, arXiv:2503.18225).

    W′ = W + (λ / r) · Σ_i b_i a_iᵀ / (‖b_i‖ ‖a_i‖) · diag(n),     n_j = ‖W_:j‖

Each of the r directions has length one, and λ is learnt by itself: it bounds how far the weight can move, whatever the
learning rate. n, the norms of W's columns, is kept as it was at the start. The b_i start at zero, so the model starts
as the base. The scales go into the two thin factors, so that all of it runs as a LoRA.

Parameters: r (in + out) + 1.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import UnsupportedError
from inlay.pieces.linear import DeltaPiece, LinearMethod, named

LEAST = 1e-4
"""A direction shorter than this is not scaled up to length one: where b starts at zero, there is none yet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeLoRA(LinearMethod):
    """ΔW of r directions of length one, whose common strength is learnt apart from them."""

    kind = "delora"
    default_targets = "query,value"
    peft_type = "DELORA"
    paper = "Bini et al. 2025, arXiv:2503.18225"
    peft_constants = (("bias", "none"),)
    peft_conv1d = False

    r: int = named("r", 8, "rank_pattern")
    """Number of directions."""
    strength: float = named("delora_lambda", 15, "lambda_pattern")
    """Where λ starts: the largest Frobenius norm of the change, in units of W's columns."""
    dropout: float = named("module_dropout", 0.0)
    """Probability of dropping an entry of the input before the change."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_number("strength")
        self.check_rate("dropout")

    def piece(self, site: Site) -> Piece:
        if not site.weight.is_floating_point():
            reason = "it needs W's norms, and W is quantised"
            raise UnsupportedError(f"DeLoRA cannot sit at {site.name}: {reason}; use LoRA there")
        return DeLoRAPiece(self, site)


class DeLoRAPiece(DeltaPiece):
    """a (r, in), b (out, r), λ (1) and n (in), by HF peft's names."""

    delora_w_norm: Tensor

    def __init__(self, method: DeLoRA, site: Site) -> None:
        super().__init__(method, site)
        (o, i), self.r = self.shape, method.r
        self.delora_A, self.delora_B = self.start(self.r, i), self.start(o, self.r, value=0.0)
        self.delora_lambda = self.start(1, value=method.strength)
        weight = site.weight.detach().to(self.place["dtype"])
        norms = torch.linalg.vector_norm(weight, dim=1 if site.transposed else 0)
        self.register_buffer("delora_w_norm", norms)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        lengths = self.delora_A.norm(dim=1).clamp(min=LEAST) * self.delora_B.norm(dim=0).clamp(min=LEAST)
        return self.delora_A * self.delora_w_norm, self.delora_B * (self.delora_lambda / lengths), 1 / self.r

    def file_tensors(self) -> dict[str, Tensor]:
        return {**super().file_tensors(), "delora_w_norm": self.delora_w_norm}
