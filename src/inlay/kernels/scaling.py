"""A vector times activations as one autograd function, for (IA)³: one pass each way, in the dtype of x.

    y = x ⊙ l,     dx = dy ⊙ l,     dl = Σ_t dy ⊙ x

Equal to x * l. The product is rounded once: l is not rounded to the dtype of x first, where a change of l near one
would be lost, and no copy of x in the dtype of l is made.

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
    """x ⊙ l, where l is of higher precision than x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Tensor) -> Tensor:
        ctx.near = near_one(vector)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, vector)
        return times(x, vector, ctx.near)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, vector = ctx.saved_tensors
        with without_autocast(dy):
            dx = times(dy, vector, ctx.near) if ctx.needs_input_grad[0] else None
            dvector = rows(dy * x).sum(0, dtype=vector.dtype) if ctx.needs_input_grad[1] else None
        return dx, dvector


def near_one(vector: Tensor) -> bool:
    """Whether every entry is at least 1/2, so that l − 1 can be rounded without harm; asked on CPU only."""
    return vector.device.type == "cpu" and bool((vector >= 0.5).all())


def times(x: Tensor, vector: Tensor, near: bool, out: Tensor | None = None) -> Tensor:
    """x ⊙ l in the dtype of x, rounded once, for x (…, n) and l (n) of higher precision; `out` may be x itself.

    As x + x ⊙ (l − 1) where l is near one: all in the dtype of x, and x itself where l is one. Otherwise in the dtype
    of l, which is as fast on CUDA and not on CPU.
    """
    if torch.is_grad_enabled():  # differentiated again
        return (x * vector).to(x.dtype)
    if near:
        return torch.addcmul(x, x, (vector - 1).to(x.dtype), out=out)
    return torch.mul(x, vector, out=torch.empty_like(x) if out is None else out)
