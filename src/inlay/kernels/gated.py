"""The second half of a gated feed-forward network (SwiGLU, GEGLU) with LoRA on its last linear, as one function.

    p = f(g) ⊙ u,     y = p Wᵀ + b + s · h Bᵀ,     h = p̃ Aᵀ          g, u (T, m): what the first two linears gave

It keeps g, u and h; p and f(g), which the stock modules and the LoRA would keep besides, are computed again in the
backward: 2 T m elements fewer, for one more activation and product (about 6 T m operations beside 4 T m out).

Equal to LoRA on f(g) ⊙ u, bit for bit: the operations are the same, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels import products
from inlay.kernels.choice import compute_dtype, without_autocast
from inlay.kernels.lora import back_through_base, base_product, gradients, narrow, rows, values

if TYPE_CHECKING:
    from inlay.engine.linear import Decode, Linear

Activation = Callable[[Tensor], Tensor]


def adapted(
    activation: Activation, g: Tensor, u: Tensor, base: Linear, a: Tensor, b: Tensor, scale: float, p: float = 0.0
) -> Tensor:
    """LoRA on a linear whose input is f(g) ⊙ u, with dropout of probability p on that input before A."""
    mask = products.mask_for(g, a, p)
    dtype = compute_dtype(g)
    arguments = (activation, g, u, base.weight, base.bias, a, b, scale / (1 - p), dtype, mask, base.decode)
    return cast(Tensor, GatedLowRank.apply(*arguments))  # type: ignore[no-untyped-call]


class GatedLowRank(torch.autograd.Function):
    """p Wᵀ + b + s · p̃ Aᵀ Bᵀ with p = f(g) ⊙ u, for g and u (…, m), W (out, m), A (r, m), B (out, r): (…, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        g: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dtype: torch.dtype,
        mask: Tensor | None,
        decode: Decode | None,
    ) -> Tensor:
        ctx.activation, ctx.scale, ctx.dtype, ctx.decode = activation, scale, dtype, decode
        p = (activation(g) * u).to(dtype)
        h = narrow(rows(p), a, mask)
        y = base_product(p, values(weight, dtype, decode), bias)
        products.widen_(rows(y), h, b, scale)
        ctx.save_for_backward(g, u, weight, a, b, h if ctx.needs_input_grad[6] else None, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        g, u, weight, a, b, h, mask = ctx.saved_tensors
        need_g, need_u, _, need_bias, need_a, need_b = ctx.needs_input_grad[1:7]
        with without_autocast(dy):
            dy = rows(dy.to(ctx.dtype))
            leaf = g.detach().requires_grad_()
            with torch.enable_grad():
                active = ctx.activation(leaf)
            p = rows((active.detach() * u).to(ctx.dtype))
            need_p = need_g or need_u
            through = partial(back_through_base, dy, weight, ctx.decode)
            dp, da, db = gradients(dy, through, p, a, b, h, mask, ctx.scale, (need_p, need_a, need_b))
            dg = du = None
            if dp is not None:
                dp = dp.to(g.dtype).view(g.shape)
                du = dp * active.detach() if need_u else None
                dg = torch.autograd.grad(active, leaf, dp * u)[0] if need_g else None
            dbias = dy.sum(0) if need_bias else None
        return None, dg, du, None, dbias, da, db, *[None] * 4
