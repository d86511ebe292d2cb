"""x A, then a B that is a mixture of several, in shares that a router gives from x A itself.

    h = A x,   P = softmax(R h) row by row,   p = the mean of P over all rows,   y = W x + b + s · (Σ_e p_e B_e)ᵀ h

    dh = s · B dy + Rᵀ dz,   dz = P ⊙ (dp − ⟨P, dp⟩) / T,   dp_e = ⟨B_e, dB⟩,   dB = s · h dyᵀ,   dB_e = p_e dB

The B_e are summed before they are multiplied, so that a row costs one product with B and not one for each expert.

FLOPs beyond the frozen linear's 4 T in out: 6 T r (in + out + n) and 6 n r out. Kept beyond its own: x, h and P.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.engine.linear import Decode
from inlay.kernels import products
from inlay.kernels.choice import compute_dtype, fusible, without_autocast
from inlay.kernels.lora import base_product, rows, suits, values


def routed(inner: Any, x: Tensor, a: Tensor, experts: Tensor, router: Tensor, scale: float) -> Tensor:
    """inner(x) + s · (Σ_e p_e B_e)ᵀ A x for A (r, in), B (n r, out) and R (n, r)."""
    if not x.numel():  # no row, no mean: an expert of a mixture that no token was sent to
        return cast(Tensor, inner(x))
    base, dtype = inner.linear(), compute_dtype(x)
    frozen = (
        base is not None and not base.weight.requires_grad and not (base.bias is not None and base.bias.requires_grad)
    )
    if not frozen or not fusible(x, a, experts, router) or not suits(base, x, dtype):
        h = F.linear(x, a.to(dtype))
        b = mixed(shares(h, router).mean(0), experts).to(h.dtype)
        y: Tensor = inner(x)
        return y + (scale * (h @ b)).to(y.dtype)
    arguments = (x, base.weight, base.bias, a, experts, router, scale, dtype, base.decode)
    return cast(Tensor, RoutedLinear.apply(*arguments))  # type: ignore[no-untyped-call]


def shares(h: Tensor, router: Tensor) -> Tensor:
    """P (T, n): how much each expert counts for each row; at least fp32, since a mean over all rows is taken."""
    logits = F.linear(rows(h), router.to(h.dtype))
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def mixed(p: Tensor, experts: Tensor) -> Tensor:
    """Σ_e p_e B_e (r, out) for B (n r, out), the experts one below the other."""
    n, out = p.shape[0], experts.shape[1]
    return (p.to(experts.dtype)[None] @ experts.view(n, -1)).view(-1, out)


class RoutedLinear(torch.autograd.Function):
    """x Wᵀ + b + s · x Aᵀ (Σ_e p_e B_e) for x (…, in) and W (out, in), frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        experts: Tensor,
        router: Tensor,
        scale: float,
        dtype: torch.dtype,
        decode: Decode | None,
    ) -> Tensor:
        ctx.scale, ctx.dtype, ctx.decode = scale, dtype, decode
        with without_autocast(x):
            inputs = x.to(dtype)
            y = base_product(inputs, values(weight, dtype, decode), bias)
            h = products.narrow(rows(inputs), a, None)
            p = shares(h, router)
            products.widen_(rows(y), h, mixed(p.mean(0), experts).t(), scale)
        ctx.save_for_backward(x, weight, a, experts, router, h, p)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, experts, router, h, p = ctx.saved_tensors
        need_x, _, _, need_a, need_experts, need_router = ctx.needs_input_grad[:6]
        with without_autocast(dy):
            shape, dy = x.shape, rows(dy.to(ctx.dtype))
            inputs, mean = rows(x.to(ctx.dtype)), p.mean(0)
            each = experts.view(len(mean), -1)
            dh, db = products.back_through_b(dy, h, mixed(mean, experts).t(), ctx.scale, (True, True))
            assert dh is not None
            assert db is not None
            whole = db.t().reshape(-1).to(each.dtype)
            dexperts = torch.outer(mean.to(whole.dtype), whole).view_as(experts) if need_experts else None
            dp = (each @ whole).to(p.dtype)
            dz = (p * (dp - (p @ dp)[:, None]) / len(p)).to(h.dtype)
            drouter = (dz.t() @ h).to(router.dtype) if need_router else None
            dh = torch.addmm(dh, dz, router.to(h.dtype))
            dx = dy @ values(weight, ctx.dtype, ctx.decode) if need_x else None
            dx, da = products.back_through_a(dh, inputs, dx, a, None, (need_x, need_a))
        return None if dx is None else dx.view(shape), None, None, da, dexperts, drouter, None, None, None
