"""Several linears with LoRA that read the same x (query, key and value; gate and up) as one autograd function.

    y_i = x W_iᵀ + b_i + s_i · h_i B_iᵀ,      [h_1 … h_n] = x̃ [A_1; …; A_n]ᵀ

    dx = Σ_i dy_i W_i + ([dh_1 … dh_n] [A_1; …; A_n]) ⊙ m,      [dA_1; …] = [dh_1 … dh_n]ᵀ x̃

Equal to LoRA on each, up to the order of sums; with dropout they share one mask, as one network before them would.
Against n functions: one product for all h, one for all dA, one for their share of dx, which is summed in one buffer
instead of by n − 1 additions (each 3 T in elements moved); one mask drawn, kept and unpacked instead of n. Kept: x, all
h, the mask; no x when every A is frozen, no h when every B is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels import products
from inlay.kernels.choice import compute_dtype, without_autocast
from inlay.kernels.lora import base_product, narrow, rows, values

if TYPE_CHECKING:
    from inlay.engine.linear import Decode, Linear


class Member(NamedTuple):
    """One of the linears, with its LoRA."""

    base: Linear
    a: Tensor
    b: Tensor
    scale: float


class Shape(NamedTuple):
    """What the function needs to know beside tensors."""

    scales: tuple[float, ...]
    ranks: list[int]
    decodes: tuple[Decode | None, ...]
    dtype: torch.dtype


def adapted(x: Tensor, members: Sequence[Member], p: float = 0.0) -> tuple[Tensor, ...]:
    """The outputs (…, out_i) of all members on x (…, in)."""
    mask = products.mask_for(x, torch.cat([member.a.detach() for member in members]), p) if p else None
    shape = Shape(
        tuple(member.scale / (1 - p) for member in members),
        [member.a.shape[0] for member in members],
        tuple(member.base.decode for member in members),
        compute_dtype(x),
    )
    tensors = [tensor for m in members for tensor in (m.base.weight, m.base.bias, m.a, m.b)]
    return cast("tuple[Tensor, ...]", Siblings.apply(x, mask, shape, *tensors))  # type: ignore[no-untyped-call]


class Siblings(torch.autograd.Function):
    """x, mask, and for each member W (out, in), b (out) or None, A (r, in), B (out, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, shape: Shape, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.shape, ctx.input_shape = shape, x.shape
        ctx.set_materialize_grads(False)  # a member that nobody reads has no gradient
        weights, biases, factors_a, factors_b = (cast("list[Tensor]", tensors[part::4]) for part in range(4))
        inputs = x.to(shape.dtype)
        hidden = narrow(rows(inputs), torch.cat([a.to(shape.dtype) for a in factors_a]), mask)
        outputs = []
        for weight, bias, b, scale, decode, h in zip(
            weights, biases, factors_b, shape.scales, shape.decodes, torch.split(hidden, shape.ranks, 1), strict=True
        ):
            y = base_product(inputs, values(weight, shape.dtype, decode), bias)
            products.widen_(rows(y), h, b, scale)
            outputs.append(y)
        needs = ctx.needs_input_grad[3:]
        inputs_kept, hidden_kept = x if any(needs[2::4]) else None, hidden if any(needs[3::4]) else None
        ctx.save_for_backward(inputs_kept, hidden_kept, mask, *weights, *factors_a, *factors_b)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        shape, count, need_x, needs = ctx.shape, len(given), ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        x, hidden, mask, *tensors = ctx.saved_tensors
        weights, factors_a, factors_b = (tensors[part * count : (part + 1) * count] for part in range(3))
        first = next((dy for dy in given if dy is not None), None)
        if first is None:
            return (None,) * (3 + 4 * count)
        with without_autocast(first):
            dys = [None if dy is None else rows(dy.to(shape.dtype)) for dy in given]
            dhidden, dfactors_b = _narrow_gradients(dys, factors_b, hidden, shape, needs[3::4])
            dx = _wide_gradient(dys, weights, shape) if need_x else None
            inputs = None if x is None else rows(x.to(shape.dtype))
            stacked = torch.cat([a.to(shape.dtype) for a in factors_a])
            dx, dstacked = products.back_through_a(dhidden, inputs, dx, stacked, mask, (need_x, any(needs[2::4])))
            dfactors_a = () if dstacked is None else torch.split(dstacked, shape.ranks)
        gradients: list[Tensor | None] = [None if dx is None else dx.view(ctx.input_shape), None, None]
        for n, dy in enumerate(dys):
            _, need_bias, need_a, _ = needs[4 * n : 4 * n + 4]
            da = None if dy is None or not need_a else dfactors_a[n].to(factors_a[n].dtype)
            dbias = None if dy is None or not need_bias else dy.sum(0)
            gradients += [None, dbias, da, dfactors_b[n]]
        return tuple(gradients)


def _narrow_gradients(
    dys: Sequence[Tensor | None],
    factors_b: Sequence[Tensor],
    hidden: Tensor | None,
    shape: Shape,
    needs_b: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """dh (T, Σ r) of all members beside one another, and each dB (out, r)."""
    dhidden, dfactors = [], []
    parts = [None] * len(dys) if hidden is None else torch.split(hidden, shape.ranks, 1)
    count = next(dy.shape[0] for dy in dys if dy is not None)
    for dy, b, scale, h, need_b in zip(dys, factors_b, shape.scales, parts, needs_b, strict=True):
        dh, db = (None, None) if dy is None else products.back_through_b(dy, h, b, scale, (True, need_b))
        dhidden.append(b.new_zeros(count, b.shape[1], dtype=shape.dtype) if dh is None else dh)
        dfactors.append(db)
    return torch.cat(dhidden, 1), dfactors


def _wide_gradient(dys: Sequence[Tensor | None], weights: Sequence[Tensor], shape: Shape) -> Tensor:
    """Σ dy W (T, in), in one buffer."""
    dx: Tensor | None = None
    for dy, weight, decode in zip(dys, weights, shape.decodes, strict=True):
        if dy is not None:
            w = values(weight, shape.dtype, decode)
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
    assert dx is not None
    return dx
