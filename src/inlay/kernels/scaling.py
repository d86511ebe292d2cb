"""A vector times activations as one autograd function, for (IA)³: one pass each way, in the dtype of x.

    y = x ⊙ l,     dx = dy ⊙ l,     dl = Σ_t dy ⊙ x

Equal to x * l. In bf16 the product is formed as x + x ⊙ (l − 1), rounded once: l near one would lose its change to
rounding, and l in fp32 would make a full-size fp32 copy of x.

FLOPs: T n forward, 3 T n backward. Kept: x (T, n), only where l is trained.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from inlay.kernels.choice import fusible, without_autocast
from inlay.kernels.lora import rows


def scaled(x: Tensor, vector: Tensor) -> Tensor:
    """x ⊙ l for x (…, n) and l (n), in the dtype of x."""
    if x.dtype == vector.dtype or not x.is_floating_point() or not fusible(x, vector):
        return (x * vector).to(x.dtype)
    return cast(Tensor, Scale.apply(x, vector))  # type: ignore[no-untyped-call]


class Scale(torch.autograd.Function):
    """x + x ⊙ (l − 1), where l is of higher precision than x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, vector)
        return torch.addcmul(x, x, (vector - 1).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, vector = ctx.saved_tensors
        with without_autocast(dy):
            dx = torch.addcmul(dy, dy, (vector - 1).to(dy.dtype)) if ctx.needs_input_grad[0] else None
            dvector = rows(dy * x).sum(0, dtype=vector.dtype) if ctx.needs_input_grad[1] else None
        return dx, dvector
