"""KaSA's piece: LoRA with singular values of its own, on a weight without its smallest ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.controller import Controller
from inlay.engine.sites import Site
from inlay.kernels import lora as kernel
from inlay.kernels import low_rank
from inlay.kernels.choice import compute_dtype, fusible
from inlay.pieces.lora.piece import LoRAPiece
from inlay.pieces.lora.start import factored


class TruncatedLoRAPiece(LoRAPiece):
    """s · B diag(σ) A x − D x, with D = `dropped_B` `dropped_A` the smallest part of W, found anew at each start."""

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        u, s, v = factored(site, method.r, type(method).__name__, keep=1)
        self.lora_diag = nn.Parameter(torch.randn_like(self.lora_A[:, 0]))
        self.register_buffer("dropped_A", v[-method.r :].to(self.lora_A.dtype).contiguous())
        self.register_buffer("dropped_B", (u * s)[:, -method.r :].to(self.lora_B.dtype).contiguous())

    dropped_A: Tensor
    dropped_B: Tensor

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        p = self.dropout if self.training else 0.0
        a = self.lora_diag[:, None] * self.lora_A
        if self.plain and not args and not kwargs and fusible(x, a, self.lora_B):
            y: Tensor = kernel.adapted(inner, x, a, self.lora_B, self.scale, p)
            return kernel.AddLowRank.apply(  # type: ignore[no-untyped-call]
                y, x, self.dropped_A, self.dropped_B, -1.0, compute_dtype(x), None, None
            )
        y = inner(x, *args, **kwargs)
        x = x.to(self.lora_A.dtype) if self.exact else x
        change = self.scale * low_rank.linear(F.dropout(x, p) if p else x, a, self.lora_B, self.lora_bias)
        return y + (change - low_rank.linear(x, self.dropped_A, self.dropped_B)).to(y.dtype)

    def both(self) -> tuple[Tensor, Tensor, float]:
        """The change and −D as one LoRA of twice the rank."""
        a = torch.cat([self.lora_diag[:, None] * self.lora_A, self.dropped_A])
        return a, torch.cat([self.lora_B, self.dropped_B / -self.scale], dim=1), self.scale

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.lora_bias is not None else self.both()

    def delta(self) -> Tensor:
        return self.scale * (self.lora_B * self.lora_diag) @ self.lora_A - self.dropped_B @ self.dropped_A

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta()

    def file_tensors(self) -> dict[str, Tensor]:
        return super().file_tensors() | {"lora_diag": self.lora_diag}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        rest = dict(tensors)
        with torch.no_grad():
            self.lora_diag.copy_(rest.pop("lora_diag"))
        super().load_file_tensors(rest)


class SingularValuePenalty(Controller):
    """β Σ σ² + γ (‖Bᵀ B − I‖ + ‖A Aᵀ − I‖), summed over the places."""

    def __init__(self, pieces: Sequence[TruncatedLoRAPiece], beta: float, gamma: float) -> None:
        self.pieces, self.beta, self.gamma = pieces, beta, gamma

    def extra_loss(self) -> Tensor | None:
        return sum((self.of(piece) for piece in self.pieces), torch.zeros(())) if self.beta or self.gamma else None

    def of(self, piece: TruncatedLoRAPiece) -> Tensor:
        """The penalty of one place, in fp32."""
        a, b, values = piece.lora_A.float(), piece.lora_B.float(), piece.lora_diag.float()
        one = torch.eye(len(values), device=a.device)
        away = torch.linalg.matrix_norm(b.mT @ b - one) + torch.linalg.matrix_norm(a @ a.mT - one)
        penalty: Tensor = self.beta * values.square().sum() + self.gamma * away
        return penalty
