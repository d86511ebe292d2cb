"""DoRA on a linear as one autograd function: no matrix of W's size is formed, and only x, h and y are kept.

    y = f ⊙ (x Wᵀ + s · h Bᵀ) + b,     h = x̃ Aᵀ,     f = m / n,     n = ‖W + s B A‖ for each output, without gradient

    u = (y − b) / f,   dm = Σ_t dy ⊙ u / n,   du = f ⊙ dy,   and LoRA's gradients of du

The norm is expanded instead of formed: n² = ‖W‖² + Σ_r B ⊙ (2s W Aᵀ + s² B A Aᵀ), in fp32, with ‖W‖² remembered while W
is the same. In bf16 this is closer to the truth than the norm of a sum rounded to bf16.

Where some m is (nearly) zero, u cannot be had from y and is kept instead.

FLOPs beyond LoRA's: 2 r in out for W Aᵀ, whatever T, and 5 T out. Bytes beyond LoRA's: W once; two passes over y and
two over dy. Kept beyond LoRA's: y (T, out), which the next operation often keeps anyway.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from inlay.engine.linear import Linear
from inlay.kernels import dropout
from inlay.kernels.choice import compute_dtype, without_autocast
from inlay.kernels.lora import gradients, narrow, rows, suits

SMALL = 1e-12
"""Magnitudes below this leave too little in y to divide it out again."""

_SQUARES: Any = WeakIdKeyDictionary()
"""‖W‖² for each output, by W, with the version of W that it was computed from."""


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ for each row, (out,), in the dtype of A and B, never below the smallest number that divides."""
    with without_autocast(weight):
        squares = row_squares(weight, a.dtype)
        cross = (weight @ a.to(weight.dtype).t()).to(a.dtype)
        change: Tensor = (b * cross.mul_(2 * scale).addmm_(b, a @ a.t(), alpha=scale * scale)).sum(1)
    return (squares + change).clamp_min_(torch.finfo(a.dtype).tiny).sqrt_()


def row_squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """‖W‖² for each row, accumulated in `dtype`; remembered for as long as W is neither changed nor replaced."""
    if torch.compiler.is_compiling() or weight.is_inference():  # which has no version to tell
        return _row_squares(weight, dtype)
    stored = weight if weight._base is None else weight._base  # a transposed weight is a new view at every call
    state = (weight._version, weight.data_ptr(), weight.stride(), dtype)
    known = _SQUARES.get(stored)
    if known is None or known[0] != state:
        known = (state, _row_squares(weight.detach(), dtype))
        _SQUARES[stored] = known
    return cast(Tensor, known[1])


def _row_squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
    return norms.square_()


def adapted(
    base: Linear, x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, scale: float, p: float = 0.0
) -> Tensor | None:
    """m ⊙ (W + s B A) x̃ / n + b on a frozen linear; None where only the plain formula will do."""
    dtype = compute_dtype(x)
    if base.decode is not None or base.weight.requires_grad or not suits(base, x, dtype):
        return None
    mask = dropout.draw(x.shape, p, x.device) if p else None
    with torch.no_grad():
        norms = row_norms(base.weight, a, b, scale)
        whole = x.device.type != "cpu" or bool((magnitude.abs() < SMALL).any())  # elsewhere, asking would wait
    arguments = (x, base.weight, base.bias, a, b, magnitude, norms, scale, dtype, mask, whole)
    return cast(Tensor, MagnitudeLinear.apply(*arguments))  # type: ignore[no-untyped-call]


class MagnitudeLinear(torch.autograd.Function):
    """f ⊙ (x Wᵀ + s · x̃ Aᵀ Bᵀ / (1 − p)) + b, for x (…, in), W (out, in), b (out) or None, m and n (out).

    With dropout the base sees x and the change x̃, so that f scales what both give, as in the plain formula.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        norms: Tensor,
        scale: float,
        dtype: torch.dtype,
        mask: Tensor | None,
        whole: bool,
    ) -> Tensor:
        ctx.scale, ctx.dtype, ctx.shape, ctx.whole = scale, dtype, x.shape, whole
        inputs = x.to(dtype)
        y = F.linear(inputs, weight.to(dtype), None if bias is None else bias.to(dtype)).contiguous()
        h = narrow(rows(inputs), a, mask)
        direction = torch.addmm(rows(y), h, b.to(dtype).t(), alpha=scale) if whole else None
        if direction is not None and bias is not None:
            direction -= bias.to(dtype)
        factor = magnitude / norms
        shift = factor - 1
        # Around y, so that a factor of exactly one leaves its bits alone, and a small shift is not lost in rounding.
        rows(y).addcmul_(rows(y), shift.to(dtype))
        if bias is not None:
            y -= (shift * bias).to(dtype)
        rows(y).addmm_(h, (factor[:, None] * b).to(dtype).t(), alpha=scale)
        need_x, _, _, need_a, need_b, need_m = ctx.needs_input_grad[:6]
        ctx.save_for_backward(
            x if need_a else None, weight if need_x else None, bias, a, b, magnitude, norms,
            h if need_b else None, mask, (direction if whole else y) if need_m else None,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, a, b, magnitude, norms, h, mask, kept = ctx.saved_tensors
        need_x, _, need_bias, need_a, need_b, need_m = ctx.needs_input_grad[:6]
        with without_autocast(dy):
            dy = rows(dy.to(ctx.dtype))
            sums = dy.sum(0, dtype=magnitude.dtype) if need_bias or (need_m and bias is not None) else None
            dm = None
            if need_m:
                dm = (dy * rows(kept)).sum(0, dtype=magnitude.dtype)
                if not ctx.whole and bias is not None and sums is not None:
                    dm = dm - sums * bias
                dm = dm / (norms if ctx.whole else magnitude)
            du = torch.addcmul(dy, dy, (magnitude / norms - 1).to(ctx.dtype))
            inputs = None if x is None else rows(x.to(ctx.dtype))
            dx = du @ weight.to(ctx.dtype) if need_x else None
            dx, da, db = gradients(du, dx, inputs, a, b, h, mask, ctx.scale, (need_x, need_a, need_b))
        dbias = sums.to(bias.dtype) if need_bias and sums is not None else None
        return None if dx is None else dx.view(ctx.shape), None, dbias, da, db, dm, *[None] * 5
