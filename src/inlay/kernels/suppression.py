"""What a weight gives in some directions, taken from something else: A = s R − Kᵀ W, for W (out, in) frozen.

    dR = s dA,     dK = −W dAᵀ

Where R is Kᵀ W and s is one, A is exactly zero. FLOPs: 2 r in out forward and as many backward. Bytes kept: none but K.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels.choice import fusible, without_autocast


def taken(k: Tensor, weight: Tensor) -> Tensor:
    """Kᵀ W (r, in) for K (out, r), in the dtype of K; multiplied in that of W."""
    with without_autocast(k):
        return (k.T.to(weight.dtype) @ weight).to(k.dtype)


def instead(r: Tensor, k: Tensor, weight: Tensor, scale: float) -> Tensor:
    """A (r, in)."""
    if weight.requires_grad or not fusible(r, k):
        return scale * r - taken(k, weight)
    return cast(Tensor, Instead.apply(r, k, weight, scale))  # type: ignore[no-untyped-call]


class Instead(torch.autograd.Function):
    """s R − Kᵀ W."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, k: Tensor, weight: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(k, weight)
        return torch.rsub(taken(k, weight), r if scale == 1 else scale * r)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor | None, ...]:
        k, weight = ctx.saved_tensors
        need_r, need_k = ctx.needs_input_grad[:2]
        with without_autocast(da):
            dr = (da if ctx.scale == 1 else ctx.scale * da) if need_r else None
            dk = torch.mm(weight, da.T.to(weight.dtype)).to(k.dtype).neg_() if need_k else None
        return dr, dk, None, None
