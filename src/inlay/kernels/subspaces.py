"""A linear whose weight's singular value decomposition is trained in part: W + ΔW, ΔW = U s V − U₀ s₀ V₀.

    ΔW = (U s) (V − V₀) + (U s − U₀ s₀) V₀,     s multiplying columns

is exactly zero at the start, and a product of rank 2 r. With h₁ = x (V − V₀)ᵀ and h₂ = x V₀ᵀ the gradients are

    dU = P dyᵀ (h₁ + h₂) s,     ds = Σ U ⊙ dyᵀ (h₁ + h₂),     dV = (dy U s)ᵀ x P

where P takes the directions out in which W is frozen. Where U₀, or V₀, completes those to a whole basis, P = U₀ U₀ᵀ,
and it is put on dy and x, not on gradients as large as the weight: x V₀ᵀ is h₂, and dy U₀ serves dx too.

FLOPs beyond the frozen linear's 4 T in out, for in = out = n: 18 T n r + 4 T r² + 4 n r². Bytes kept: h₁ + h₂ and h₂;
x where in is more than out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels.choice import compute_dtype, fusible, without_autocast
from inlay.kernels.lora import rows, suits

if TYPE_CHECKING:
    from inlay.engine.host import Inner


class Triplets(NamedTuple):
    """U (out, r), s (r) and V (r, in)."""

    u: Tensor
    s: Tensor
    v: Tensor


class Frozen(NamedTuple):
    """Where the decomposition began, and the directions that stay: (k, out) and (k, in), None where U₀ or V₀ do."""

    start: Triplets
    out: Tensor | None
    into: Tensor | None


def without(rows_: Tensor, frozen: Tensor | None, free: Tensor) -> Tensor:
    """Rows less their part in the frozen directions, or their part in the free ones, where these are given instead."""
    basis = (free if frozen is None else frozen).to(rows_.dtype)
    inside = (rows_ @ basis.T) @ basis
    return inside if frozen is None else rows_ - inside


def kept_free(rows_: Tensor, frozen: Tensor | None, free: Tensor) -> Tensor:
    """Rows themselves, whose gradient loses what is frozen."""
    there = rows_.detach()
    return without(rows_ - there, frozen, free) + there


def change(now: Triplets, frozen: Frozen) -> Tensor:
    """ΔW (out, in)."""
    a, b = thin(now, frozen)
    return b @ a


def thin(now: Triplets, frozen: Frozen) -> tuple[Tensor, Tensor]:
    """A (2 r, in) and B (out, 2 r) with ΔW = B A, whose gradients are kept from the frozen directions."""
    start = frozen.start
    u, v = kept_free(now.u.T, frozen.out, start.u.T).T, kept_free(now.v, frozen.into, start.v)
    sides = u * now.s
    return torch.cat((v - start.v, start.v)), torch.cat((sides, sides - start.u * start.s), 1)


def changed(inner: Inner, x: Tensor, now: Triplets, frozen: Frozen) -> Tensor:
    """inner(x) + x ΔWᵀ for x (…, in)."""
    base, dtype = inner.linear(), compute_dtype(x)
    plain = base is None or base.decode is not None or base.weight.requires_grad or not fusible(x, *now)
    if base is None or plain or not torch.is_grad_enabled() or not suits(base, x, dtype):
        y: Tensor = inner(x)
        with without_autocast(x):
            a, b = thin(now, frozen)
            return y + F.linear(F.linear(x.to(dtype), a.to(dtype)), b.to(dtype)).to(y.dtype)
    arguments = (x, base.weight, base.bias, dtype, frozen, *now)
    return cast(Tensor, ChangedLinear.apply(*arguments))  # type: ignore[no-untyped-call]


class ChangedLinear(torch.autograd.Function):
    """x (W + ΔW)ᵀ + b for x (…, in), W (out, in) frozen, b (out) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        frozen: Frozen,
        u: Tensor,
        s: Tensor,
        v: Tensor,
    ) -> Tensor:
        ctx.dtype, ctx.frozen, ctx.shape = dtype, frozen, x.shape
        start = frozen.start
        inputs, sides = rows(x.to(dtype)), u * s
        y = F.linear(inputs, weight.to(dtype), None if bias is None else bias.to(dtype))
        h = inputs @ (v - start.v).to(dtype).T
        free = inputs @ start.v.to(dtype).T
        y.addmm_(h, sides.to(dtype).T).addmm_(free, (sides - start.u * start.s).to(dtype).T)
        ctx.save_for_backward(x if frozen.into is not None else None, weight, u, s, v, h.add_(free), free)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, s, v, both, free = ctx.saved_tensors
        frozen, dtype, (start, _, _) = ctx.frozen, ctx.dtype, ctx.frozen
        need = ctx.needs_input_grad
        with without_autocast(dy):
            dy = rows(dy.to(dtype))
            narrow, outer = dy @ (u * s).to(dtype), dy @ start.u.to(dtype)
            dx = None
            if need[0]:
                dx = dy @ weight.to(dtype)
                dx.addmm_(narrow, (v - start.v).to(dtype)).addmm_(narrow - outer * start.s.to(dtype), start.v.to(dtype))
                dx = dx.view(ctx.shape)
            du, ds = ChangedLinear.of_left(dy, outer, both, u, s, frozen) if need[5] or need[6] else (None, None)
            dv = None
            if need[7] and frozen.into is None:
                dv = (narrow.T @ free).to(v.dtype) @ start.v
            elif need[7]:
                dv = without((narrow.T @ rows(x.to(dtype))).to(v.dtype), frozen.into, start.v)
        dbias = dy.sum(0) if need[2] else None
        return dx, None, dbias, None, None, du, ds, dv

    @staticmethod
    def of_left(dy: Tensor, outer: Tensor, both: Tensor, u: Tensor, s: Tensor, frozen: Frozen) -> tuple[Tensor, Tensor]:
        """dU and ds from dy (T, out), dy U₀ (T, r) and x Vᵀ (T, r)."""
        whole = (dy.T @ both).to(u.dtype)
        ds = (whole * u).sum(0)
        if frozen.out is None:
            return frozen.start.u @ ((outer.T @ both).to(u.dtype) * s), ds
        return without((whole * s).T, frozen.out, frozen.start.u.T).T, ds
