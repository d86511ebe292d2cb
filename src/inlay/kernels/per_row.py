"""A low-rank change that is another one for each row of the batch.

    y_b = x_b Wᵀ + bias + h_b B_b,   h_b = x_b A_b        x: (rows, …, in), A: (rows, in, r), B: (rows, r, out)

    dh_b = dy_b B_bᵀ,   dB_b = h_bᵀ dy_b,   dA_b = x_bᵀ dh_b,   dx_b = dy_b W + dh_b A_bᵀ

FLOPs beyond the frozen linear's 4 T in out: 6 T r (in + out) over all T vectors. Kept beyond its own: x and h.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.engine.linear import Decode
from inlay.kernels.choice import compute_dtype, fusible, without_autocast
from inlay.kernels.lora import base_product, suits, values


def per_row(inner: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """inner(x) + x_b A_b B_b for x (rows, …, in)."""
    base, dtype = inner.linear(), compute_dtype(x)
    trained = base is not None and any(t is not None and t.requires_grad for t in (base.weight, base.bias))
    if base is None or trained or not fusible(x, a, b) or not suits(base, x, dtype):
        y: Tensor = inner(x)
        change = torch.bmm(torch.bmm(split(x, a).to(dtype), a.to(dtype)), b.to(dtype))
        return y + change.to(y.dtype).view(y.shape)
    arguments = (x, base.weight, base.bias, a, b, dtype, base.decode)
    return cast(Tensor, RowLinear.apply(*arguments))  # type: ignore[no-untyped-call]


def split(x: Tensor, a: Tensor) -> Tensor:
    """(rows, …, features) as (rows, n, features)."""
    return x.reshape(len(a), -1, x.shape[-1])


class RowLinear(torch.autograd.Function):
    """x Wᵀ + bias + x_b A_b B_b for x (rows, …, in) and W (out, in), frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        dtype: torch.dtype,
        decode: Decode | None,
    ) -> Tensor:
        ctx.dtype, ctx.decode = dtype, decode
        with without_autocast(x):
            inputs = x.to(dtype)
            y = base_product(inputs, values(weight, dtype, decode), bias)
            h = torch.bmm(split(inputs, a), a.to(dtype))
            y.view(len(a), -1, y.shape[-1]).baddbmm_(h, b.to(dtype))
        ctx.save_for_backward(x, weight, a, b, h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, h = ctx.saved_tensors
        need_x, _, _, need_a, need_b = ctx.needs_input_grad[:5]
        with without_autocast(dy):
            dy = dy.to(ctx.dtype)
            each = split(dy, a)
            db = torch.bmm(h.mT, each).to(b.dtype) if need_b else None
            dh = torch.bmm(each, b.to(ctx.dtype).mT) if need_x or need_a else None
            da = torch.bmm(split(x.to(ctx.dtype), a).mT, dh).to(a.dtype) if need_a and dh is not None else None
            dx = None
            if need_x and dh is not None:
                dx = (dy @ values(weight, ctx.dtype, ctx.decode)).contiguous()
                split(dx, a).baddbmm_(dh, a.to(ctx.dtype).mT)
        return dx, None, None, da, db, None, None
