"""LoRA on a linear as one autograd function, which keeps x (T, in), h (T, r) and nothing else of full size.

    y = x Wᵀ + b + s · h Bᵀ,     h = x̃ Aᵀ,      x̃ = x ⊙ m with dropout (s then holds 1 / (1 − p)), x otherwise

    dh = s · dy B,   dB = s · dyᵀ h,   dA = dhᵀ x̃,   dx = dy W + (dh A) ⊙ m

Equal to `low_rank.linear` beside the host's own call. Computed in the dtype of x: A and B are cast to it (r (in + out)
elements a step) and their gradients rounded to it once, which in bf16 is an error of about 3e-3.

FLOPs beyond the frozen linear's 4 T in out: 6 T r (in + out). Bytes beyond its own: one read and write of y and of dx,
two reads of dy and of x. Kept beyond its own: x, which siblings share, h, and T in / 8 bytes with dropout; no x when A
is frozen, no h when B is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels import low_rank, products
from inlay.kernels.choice import autocasting, compute_dtype, fusible, without_autocast

if TYPE_CHECKING:
    from inlay.engine.host import Inner
    from inlay.engine.linear import Decode, Linear

FEW_ROWS = 8
"""At inference on a CPU, so many rows are multiplied by A and B as they are, in fp32: casting these costs more."""


def adapted(
    inner: Inner, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float = 0.0, gate: Tensor | None = None
) -> Tensor:
    """inner(x) + s · B (g ⊙ A x̃), with dropout of probability p on x, and a gate g (…, r) on h where there is one.

    Here plain formula or function is chosen.
    """
    if not fusible(x, a, b):
        y: Tensor = inner(x)
        return y + (scale * low_rank.linear(F.dropout(x, p) if p else x, a, b, gate=gate)).to(y.dtype)
    dtype = compute_dtype(x)
    mask = products.mask_for(x, a, p)
    scale = scale / (1 - p)
    base = inner.linear()
    if not torch.is_grad_enabled():
        return inferred(inner, base, x, a, b, scale, dtype, mask, gate)
    if base is None or not suits(base, x, dtype):
        return cast(Tensor, AddLowRank.apply(inner(x), x, a, b, scale, dtype, mask, gate))  # type: ignore[no-untyped-call]
    arguments = (x, base.weight, base.bias, a, b, scale, dtype, mask, gate, base.decode)
    return cast(Tensor, LowRankLinear.apply(*arguments))  # type: ignore[no-untyped-call]


def suits(base: Linear, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel computes what the base would for this x: in the same dtype, and not slower."""
    if base.few_rows and not torch.is_grad_enabled() and x.numel() <= base.few_rows * x.shape[-1]:
        return False
    return base.dtype == dtype or autocasting(x)


def inferred(
    inner: Inner,
    base: Linear | None,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    dtype: torch.dtype,
    mask: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """The same without gradients: added in place to what the base gave, where that is a linear's own new tensor."""
    few = x.device.type == "cpu" and dtype.itemsize < a.dtype.itemsize and x.numel() <= FEW_ROWS * x.shape[-1]
    if base is not None and suits(base, x, dtype):
        y = base_product(x.to(dtype), values(base.weight, dtype, base.decode), base.bias)
    else:
        y = inner(x)
    kind = a.dtype if few else dtype
    h = narrow(rows(x.to(kind)), a, mask, gate)
    if base is None or not y.is_contiguous():
        return torch.addmm(rows(y).to(kind), h, b.to(kind).t(), alpha=scale).to(y.dtype).view(y.shape)
    if y.dtype == kind:
        products.widen_(rows(y), h, b, scale)
    else:
        rows(y).add_(h @ b.to(kind).t(), alpha=scale)
    return y


class LowRankLinear(torch.autograd.Function):
    """x Wᵀ + b + s · x̃ Aᵀ Bᵀ for x (…, in), W (out, in), b (out) or None, A (r, in), B (out, r): (…, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dtype: torch.dtype,
        mask: Tensor | None,
        gate: Tensor | None,
        decode: Decode | None,
    ) -> Tensor:
        ctx.scale, ctx.dtype, ctx.decode, ctx.shape = scale, dtype, decode, x.shape
        inputs = x.to(dtype)
        h = narrow(rows(inputs), a, mask, gate)  # x is in the cache now, and y will be for what comes after it
        y = base_product(inputs, values(weight, dtype, decode), bias)
        products.widen_(rows(y), h, b, scale)
        need_x, need_weight, _, need_a, need_b = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_a or need_weight else None, weight if need_x else None, a, b, h if need_b else None, mask, gate
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, h, mask, gate = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        with without_autocast(dy):
            dy = rows(dy.to(ctx.dtype))
            inputs = None if x is None else rows(x.to(ctx.dtype))
            through = partial(back_through_base, dy, weight, ctx.decode)
            dx, da, db = gradients(dy, through, inputs, a, b, h, mask, ctx.scale, (need_x, need_a, need_b), gate)
            dweight = dy.t() @ inputs if need_weight and inputs is not None else None
            dbias = dy.sum(0) if need_bias else None
        return None if dx is None else dx.view(ctx.shape), dweight, dbias, da, db, *[None] * 5


class AddLowRank(torch.autograd.Function):
    """y + s · x̃ Aᵀ Bᵀ, where something else made y (…, out) from x (…, in)."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        dtype: torch.dtype,
        mask: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        ctx.scale, ctx.dtype, ctx.shape = scale, dtype, x.shape
        h = narrow(rows(x.to(dtype)), a, mask, gate)
        total = torch.addmm(rows(y).to(dtype), h, b.to(dtype).t(), alpha=scale)
        _, _, need_a, need_b = ctx.needs_input_grad[:4]
        ctx.save_for_backward(x if need_a else None, a, b, h if need_b else None, mask, gate)
        return total.to(y.dtype).view(y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, h, mask, gate = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with without_autocast(dy):
            inputs = None if x is None else rows(x.to(ctx.dtype))
            part = rows(dy.to(ctx.dtype))
            dx, da, db = gradients(part, None, inputs, a, b, h, mask, ctx.scale, needs[1:4], gate)
        return dy if needs[0] else None, None if dx is None else dx.view(ctx.shape), da, db, *[None] * 4


def rows(x: Tensor) -> Tensor:
    """(…, features) as (T, features)."""
    return x.reshape(-1, x.shape[-1])


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b for x (…, in), in the dtype of x: (…, out), new, contiguous, with the bits of the base's own call."""
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()


def values(weight: Tensor, dtype: torch.dtype, decode: Decode | None) -> Tensor:
    """W (out, in) in this dtype; a quantised one is decoded in the forward and again in the backward, and not kept."""
    return weight.to(dtype) if decode is None else decode(weight, dtype)


def back_through_base(dy: Tensor, weight: Tensor, decode: Decode | None) -> Tensor:
    """dy W (T, in) for dy (T, out), in the dtype of dy."""
    return dy @ values(weight, dy.dtype, decode)


def narrow(x: Tensor, a: Tensor, mask: Tensor | None, gate: Tensor | None = None) -> Tensor:
    """h = g ⊙ x̃ Aᵀ, (T, r)."""
    h = products.narrow(x, a, mask)
    return h if gate is None else gated(h, gate)


def gated(h: Tensor, gate: Tensor) -> Tensor:
    """g ⊙ h for h (T, r) and g (rows, r), in which each row of g stands for T / rows consecutive ones of h."""
    return (h.view(gate.shape[0], -1, h.shape[1]) * gate[:, None].to(h.dtype)).view(h.shape)


def gradients(
    dy: Tensor,
    through: Callable[[], Tensor] | None,
    x: Tensor | None,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    mask: Tensor | None,
    scale: float,
    needs: tuple[bool, bool, bool],
    gate: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB) of the low-rank part for dy (T, out); where `through` says what comes back through the base (T, in),
    that is added to in place. It is asked after dh, for which dy is still in the cache: 1 % of a step.
    """
    need_x, need_a, need_b = needs
    if torch.is_grad_enabled() and need_b:  # differentiated again: h has to be a function of x and A
        if x is None:
            raise RuntimeError(
                "a second derivative through LoRA needs its input, which is not kept while A is frozen; let A require "
                "gradients, or use precision='exact'"
            )
        h = narrow(x, a, mask, gate)
    dh, db = products.back_through_b(dy, h, b, scale, (need_x or need_a, need_b))
    dx = None if through is None or not need_x else through()
    if dh is None:
        return dx, None, db
    if gate is not None:
        dh = gated(dh, gate)
    dx, da = products.back_through_a(dh, x, dx, a, mask, (need_x, need_a))
    return dx, da, db
