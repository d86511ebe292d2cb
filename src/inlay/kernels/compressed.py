"""LoRA on a linear whose backward keeps x as one number for each group of features (VeLoRA).

    y + s · B A x,      c (T, g) = X e,      x̂ = ρ · c ⊗ e      X (T, g, d) the groups of x, e (d) a unit vector

    dx = (s · dy B) A,     dB = s · dyᵀ (x Aᵀ),     dA = (s · dy B)ᵀ x̂ = ρ · ((s · dy B)ᵀ c) ⊗ e

dx and dB are exact; dA is that of x̂, which is never formed. The last group is filled up with zeros. Bytes kept: T g for
x, and h = x Aᵀ, in place of T in.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels.choice import compute_dtype, without_autocast
from inlay.kernels.lora import rows


def grouped(x: Tensor, groups: int) -> Tensor:
    """x (…, in) as (T, g, d)."""
    flat, d = rows(x), -(-x.shape[-1] // groups)
    missing = groups * d - x.shape[-1]
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, groups, d)


def mean_direction(x: Tensor, groups: int) -> Tensor:
    """The mean of all groups of all rows as a unit vector (d), in fp32; a constant one where the mean is zero."""
    mean = grouped(x.detach(), groups).mean((0, 1)).float()
    norm = torch.linalg.vector_norm(mean)
    return torch.where(norm > 0, mean / norm, torch.full_like(mean, mean.numel() ** -0.5))


def adapted(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, direction: Tensor, groups: int, rho: float
) -> Tensor:
    """y (…, out) + s · B A x for x (…, in), with the compressed x in the gradient of A."""
    return cast(Tensor, AddCompressed.apply(y, x, a, b, scale, direction, groups, rho))  # type: ignore[no-untyped-call]


class AddCompressed(torch.autograd.Function):
    """y + s · x Aᵀ Bᵀ."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, direction: Tensor, groups: int, rho: float
    ) -> Tensor:
        dtype = compute_dtype(x)
        with without_autocast(x):
            inputs = x.to(dtype)
            h = rows(inputs) @ a.to(dtype).t()
            kept = grouped(inputs, groups) @ direction.to(dtype)
            total = torch.addmm(rows(y).to(dtype), h, b.to(dtype).t(), alpha=scale)
        ctx.scale, ctx.rho, ctx.shape, ctx.dtype = scale, rho, x.shape, dtype
        ctx.save_for_backward(kept, h, a, b, direction)
        return total.to(y.dtype).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, h, a, b, direction = ctx.saved_tensors
        need_y, need_x, need_a, need_b = ctx.needs_input_grad[:4]
        dx = da = db = None
        with without_autocast(dy):
            part = rows(dy.to(ctx.dtype))
            dh = (part @ b.to(ctx.dtype)).mul_(ctx.scale)
            if need_x:
                dx = (dh @ a.to(ctx.dtype)).view(ctx.shape)
            if need_a:
                by_group = (dh.t() @ kept).to(a.dtype)
                da = (ctx.rho * by_group[:, :, None] * direction.to(a.dtype)).flatten(1)[:, : a.shape[1]]
            if need_b:
                db = (h.t() @ part).t().mul(ctx.scale).to(b.dtype)
        return dy if need_y else None, dx, da, db, None, None, None, None
