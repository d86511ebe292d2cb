"""DoRA on a linear as one autograd function: no matrix of W's size is formed, and only x, h and y are kept.

    y = f ⊙ (x Wᵀ + s · h Bᵀ) + b,     h = x̃ Aᵀ,     f = m / n,     n = ‖W + s B A‖ for each output, without gradient

    u = (y − b) / f,   dm = Σ_t dy ⊙ u / n,   du = f ⊙ dy,   and LoRA's gradients of du

The norm is expanded instead of formed: n² = ‖W‖² + Σ_r B ⊙ (2s W Aᵀ + s² B A Aᵀ), in fp32, with ‖W‖² remembered while W
is the same. In bf16 this is closer to the truth than the norm of a sum rounded to bf16.

Where some f is small, or some m beside its b, u cannot be had from y to full precision and is kept instead.

FLOPs beyond LoRA's: 2 r in out for W Aᵀ, whatever T, and 5 T out. Bytes beyond LoRA's: W once; two passes over y and
two over dy. Kept beyond LoRA's: y (T, out), which the next operation often keeps anyway.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from inlay.engine.linear import Linear
from inlay.errors import UnsupportedError
from inlay.kernels import products
from inlay.kernels.choice import compute_dtype, fusible, without_autocast
from inlay.kernels.lora import back_through_base, base_product, gradients, narrow, rows, suits
from inlay.kernels.scaling import near_one, times

SAMPLES = 512

_SQUARES: Any = WeakIdKeyDictionary()
"""‖W‖² for each output, by W, with the state of W that it was computed from."""
_NORMS: Any = WeakIdKeyDictionary()
"""‖W + s B A‖ for each output, by B, with s, the ‖W‖², A and B that it was computed from."""


def norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`row_norms` without gradient; at inference on a CPU remembered for as long as W, A and B stay as they are.

    W Aᵀ is r times the work of a row of x. A and B are compared number by number, which costs a thousandth of it.
    """
    infer = not torch.is_grad_enabled() and fusible(weight, a, b)
    with torch.no_grad():
        if not infer or weight.device.type != "cpu" or weight.is_inference():
            return row_norms(weight, a, b, scale).detach()  # forward-mode differentiation knows no `no_grad`
        squares = row_squares(weight, a.dtype)
        known = _NORMS.get(b)
        if known is None or known[0] != scale or known[1] is not squares or not equal(known[2], (a, b)):
            known = (scale, squares, (a.detach().clone(), b.detach().clone()), row_norms(weight, a, b, scale))
            _NORMS[b] = known
        return cast(Tensor, known[3])


def equal(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    """Whether these tensors are the same, pair by pair."""
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(some, others, strict=True))


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ for each row, (out,), in the dtype of A and B, never below the smallest number that divides."""
    with without_autocast(weight):
        squares = row_squares(weight, a.dtype)
        cross = (weight @ a.to(weight.dtype).t()).to(a.dtype)
        change: Tensor = (b * torch.addmm(2 * scale * cross, b, a @ a.t(), alpha=scale * scale)).sum(1)
    return (squares + change).clamp_min_(torch.finfo(a.dtype).tiny).sqrt_()


def row_squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """‖W‖² for each row, accumulated in `dtype`; on CPU remembered for as long as W stays as it is.

    A change that torch's version of W does not show (through `W.data`) is seen by some of its numbers, spread over it.
    """
    if not fusible(weight) or weight.device.type != "cpu" or weight.is_inference():
        return _row_squares(weight, dtype)
    stored = weight if weight._base is None else weight._base  # a transposed weight is a new view at every call
    state = (weight._version, weight.data_ptr(), weight.shape, weight.stride(), dtype)
    sample = weight.detach().reshape(-1)[:: max(1, weight.numel() // SAMPLES)] if weight.is_contiguous() else weight[0]
    known = _SQUARES.get(stored)
    if known is None or known[0] != state or not torch.equal(known[1], sample):
        known = (state, sample.detach().clone(), _row_squares(weight.detach(), dtype))
        _SQUARES[stored] = known
    return cast(Tensor, known[2])


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
    mask = products.mask_for(x, a, p)
    norm = norms(base.weight, a, b, scale)
    with torch.no_grad():
        near = near_one(magnitude / norm) and (base.bias is None or bool((8 * magnitude >= base.bias.abs()).all()))
    arguments = (x, base.weight, base.bias, a, b, magnitude, norm, scale / (1 - p), dtype, mask, near)
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
        near: bool,
    ) -> Tensor:
        ctx.scale, ctx.dtype, ctx.shape, ctx.near = scale, dtype, x.shape, near
        inputs = x.to(dtype)
        h = narrow(rows(inputs), a, mask)
        y = base_product(inputs, weight.to(dtype), bias)
        direction = None if near else torch.addmm(rows(y), h, b.to(dtype).t(), alpha=scale)
        if direction is not None and bias is not None:
            direction -= bias.to(dtype)
        factor = magnitude / norms
        times(y, factor, near, out=y)
        if bias is not None:
            y -= ((factor - 1) * bias).to(dtype)
        products.widen_(rows(y), h, factor[:, None] * b, scale)
        _, _, _, need_a, need_b, need_m = ctx.needs_input_grad[:6]
        ctx.save_for_backward(
            x if need_a else None, weight, bias, a, b, magnitude, norms,
            h if need_b else None, mask, (y if near else direction) if need_m else None,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, a, b, magnitude, norms, h, mask, kept = saved_tensors(ctx)
        need_x, _, need_bias, need_a, need_b, need_m = ctx.needs_input_grad[:6]
        with without_autocast(dy):
            dy = rows(dy.to(ctx.dtype))
            sums = dy.sum(0, dtype=magnitude.dtype) if need_bias or (need_m and bias is not None) else None
            inputs = None if x is None else rows(x.to(ctx.dtype))
            dm = None
            if need_m:
                if torch.is_grad_enabled() and not ctx.near:
                    kept = direction_again(inputs, weight.to(ctx.dtype), a, b, mask, ctx.scale)
                dm = (dy * rows(kept)).sum(0, dtype=magnitude.dtype)
                if ctx.near and bias is not None and sums is not None:
                    dm = dm - sums * bias
                dm = dm / (magnitude if ctx.near else norms)
            du = times(dy, magnitude / norms, ctx.near)
            through = partial(back_through_base, du, weight, None)
            dx, da, db = gradients(du, through, inputs, a, b, h, mask, ctx.scale, (need_x, need_a, need_b))
        dbias = sums.to(bias.dtype) if need_bias and sums is not None else None
        return None if dx is None else dx.view(ctx.shape), None, dbias, da, db, dm, *[None] * 5


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """What the forward kept. Raises UnsupportedError when somebody has written into the output since."""
    try:
        return cast("tuple[Any, ...]", ctx.saved_tensors)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise UnsupportedError(
            "DoRA keeps the output of its linear for the backward, and the model changes it in place (as "
            "ReLU(inplace=True) does): use DoRA(precision='exact'), which keeps more"
        ) from error


def direction_again(
    x: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """u (T, out) as a function of what it was made of, for a second derivative."""
    if x is None:
        raise RuntimeError(
            "a second derivative through DoRA needs its input, which is not kept while A is frozen; let A require "
            "gradients, or use precision='exact'"
        )
    return x @ weight.t() + scale * (narrow(x, a, mask) @ b.to(x.dtype).t())
