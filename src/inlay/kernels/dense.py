"""A linear whose weight changes as a whole, W + ΔW(θ), where ΔW has no thin factors: nothing of its size is kept.

    y = x (W + ΔW)ᵀ + b,     dΔW = dyᵀ x,     dθ = dΔW · ∂ΔW/∂θ,     dx = dy (W + ΔW)

Equal to inner(x) + F.linear(x, ΔW). ΔW is formed in the forward and again in the backward. In fp32 the sum is formed
and multiplied once; in half precision W + ΔW would lose a small ΔW to rounding, so that the two are multiplied apart.

FLOPs: 6 T in out in fp32, 10 in half precision, and ΔW twice. Bytes kept: x, and θ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels.choice import compute_dtype, fusible, without_autocast
from inlay.kernels.lora import rows, suits

if TYPE_CHECKING:
    from inlay.engine.host import Inner

Form = Callable[..., Tensor]
"""ΔW (out, in) from θ; differentiable, and the same each time."""


def changed(inner: Inner, x: Tensor, form: Form, parameters: Sequence[Tensor]) -> Tensor:
    """inner(x) + x ΔWᵀ for x (…, in), with ΔW = form(*parameters)."""
    base, dtype = inner.linear(), compute_dtype(x)
    if base is None or base.weight.requires_grad or not fusible(x, *parameters) or not suits(base, x, dtype):
        y: Tensor = inner(x)
        with without_autocast(x):
            delta = form(*parameters)
        return y + F.linear(x, delta.to(x.dtype)).to(y.dtype)
    if base.decode is not None:
        y = inner(x)
        return y + cast(Tensor, ChangedLinear.apply(x, None, None, form, dtype, *parameters)).to(y.dtype)  # type: ignore[no-untyped-call]
    return cast(Tensor, ChangedLinear.apply(x, base.weight, base.bias, form, dtype, *parameters))  # type: ignore[no-untyped-call]


class ChangedLinear(torch.autograd.Function):
    """x (W + ΔW)ᵀ + b for x (…, in), W (out, in) frozen, b (out) or None; without W, x ΔWᵀ."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form, dtype: torch.dtype, *theta: Tensor
    ) -> Tensor:
        ctx.form, ctx.dtype = form, dtype
        with without_autocast(x):
            delta = form(*theta)
        ctx.save_for_backward(x, weight, *theta)
        inputs, (first, second) = x.to(dtype), matrices(weight, delta, dtype)
        y = F.linear(inputs, first, None if bias is None else bias.to(dtype))
        return y if second is None else y + F.linear(inputs, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *theta = ctx.saved_tensors
        need_x, _, need_bias, _, _, *need_theta = ctx.needs_input_grad
        with without_autocast(dy):
            dy = dy.to(ctx.dtype)
            leaves = [t.detach().requires_grad_(need) for t, need in zip(theta, need_theta, strict=True)]
            with torch.enable_grad():
                delta = ctx.form(*leaves)
            dx = None
            if need_x:
                first, second = matrices(weight, delta.detach(), ctx.dtype)
                dx = dy @ first if second is None else dy @ first + dy @ second
            found: dict[int, Tensor | None] = {}
            trained = [leaf for leaf in leaves if leaf.requires_grad]
            if trained:
                ddelta = (rows(dy).t() @ rows(x.to(ctx.dtype))).to(delta.dtype)
                gradients = torch.autograd.grad(delta, trained, ddelta, allow_unused=True)
                found = {id(leaf): gradient for leaf, gradient in zip(trained, gradients, strict=True)}
        dbias = rows(dy).sum(0) if need_bias else None
        return dx, None, dbias, None, None, *(found.get(id(leaf)) for leaf in leaves)


def matrices(weight: Tensor | None, delta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What x is multiplied by: W + ΔW where the sum keeps all of ΔW, otherwise the two apart; ΔW if there is no W."""
    if weight is None:
        return delta.to(dtype), None
    if weight.dtype == delta.dtype == dtype:
        return weight + delta, None
    return weight.to(dtype), delta.to(dtype)
