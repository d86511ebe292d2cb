"""How much a loss depends on each entry of ΔW, summed up, without ΔW or its gradient ever existing whole.

    Σ_ij |ΔW_ij · ∂L/∂ΔW_ij|,     ΔW = s · B A,     ∂L/∂ΔW = dyᵀ x

The absolute value stands inside the sum, so that no product of thin factors gives it: rows of ΔW and of dyᵀ x are made
a few at a time. FLOPs: 2 T in out (half of a frozen linear's step) and 2 r in out. Bytes at once: ROWS · in, twice.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels.choice import without_autocast
from inlay.kernels.lora import rows

ROWS = 256
"""Rows of ΔW made at once."""


def watched(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, probe: Tensor) -> Tensor:
    """y (…, out), as it is; when it is differentiated, the sum for x (…, in) is added to the gradient of `probe` ().

    As a gradient it adds up over calls and accumulated batches, under checkpointing and compilation, as gradients do.
    """
    return cast(Tensor, Watched.apply(y, x, a.detach(), b.detach(), scale, probe))  # type: ignore[no-untyped-call]


def sensitivity(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The sum for dy (T, out), x (T, in), A (r, in), B (out, r)."""
    total = torch.zeros((), dtype=torch.float32, device=dy.device)
    x = x.to(dy.dtype)
    for start in range(0, b.shape[0], ROWS):
        part = slice(start, start + ROWS)
        gradient = dy[:, part].t() @ x
        total += (b[part] @ a).mul_(gradient).abs_().sum(dtype=torch.float32)
    return total * abs(scale)


class Watched(torch.autograd.Function):
    """The identity on y, with the sensitivity of ΔW as the gradient of the probe."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, probe: Tensor) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(x, a, b)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        with without_autocast(dy):
            found = sensitivity(rows(dy), rows(x), a, b, ctx.scale) if ctx.needs_input_grad[5] else None
        return dy, None, None, None, None, found
