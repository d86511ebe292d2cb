"""The thin products of a low-rank change, (T, r) wide: torch's own, or Triton's where these were asked for.

    h = x̃ Aᵀ,    y += s · h Bᵀ,    dh = s · dy B and dB = s · dyᵀ h,    dA = dhᵀ x̃ and dx += (dh A) ⊙ m

All kernels go through here, so this is the one place that knows of both. Triton's are used on CUDA tensors when the
environment says INLAY_TRITON=1: they are tested in its interpreter and compiled for sm_80 and sm_90, but have not been
measured on a device yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.kernels import dropout
from inlay.kernels import triton as fused


def in_triton(x: Tensor, a: Tensor) -> bool:
    """Whether Triton's kernels compute for this x and A; what is differentiated again is left to torch."""
    return fused.available(x, a.shape[0]) and not (torch.is_grad_enabled() and x.requires_grad)


def mask_for(x: Tensor, a: Tensor, p: float) -> Tensor | None:
    """The mask of dropout on x before A; None where nothing is dropped."""
    if not p:
        return None
    if fused.available(x, a.shape[0]):
        return dropout.counter(p)
    return dropout.draw(x.shape, p, x.device)


def narrow(x: Tensor, a: Tensor, mask: Tensor | None) -> Tensor:
    """h = x̃ Aᵀ, (T, r), for x (T, in) and A (r, in)."""
    if mask is not None and dropout.is_counter(mask) and in_triton(x, a):
        from inlay.kernels.triton.dropout import dropped_product

        return dropped_product(x.contiguous(), a, *dropout.rate_and_seed(mask))
    return (x if mask is None else dropout.apply(x, mask)) @ a.to(x.dtype).t()


def widen_(y: Tensor, h: Tensor, b: Tensor, scale: float) -> None:
    """y += s · h Bᵀ in place, for y (T, out), contiguous, and B (out, r)."""
    if in_triton(y, b.t()):
        from inlay.kernels.triton.epilogue import add_product_

        add_product_(y, h.contiguous(), b, scale)
    else:
        y.addmm_(h, b.to(y.dtype).t(), alpha=scale)


def back_through_b(
    dy: Tensor, h: Tensor | None, b: Tensor, scale: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dh, dB) as far as they are needed, for dy (T, out)."""
    need_h, need_b = needs
    if need_h and need_b and h is not None and in_triton(dy, b.t()):
        from inlay.kernels.triton.gradients import MOST_RANK, product_gradients

        if b.shape[1] <= MOST_RANK:
            return product_gradients(dy.contiguous(), h.contiguous(), b, scale)
    dh = (dy @ b.to(dy.dtype)).mul_(scale) if need_h else None
    db = (h.t() @ dy).t().mul(scale).to(b.dtype) if need_b and h is not None else None
    return dh, db


def back_through_a(
    dh: Tensor, x: Tensor | None, dx: Tensor | None, a: Tensor, mask: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dA) as far as they are needed, for dh (T, r); `dx` (T, in), where given, is added to in place."""
    need_x, need_a = needs
    if mask is not None and dropout.is_counter(mask) and in_triton(dh, a):
        from inlay.kernels.triton.dropout import dropped_gradients_

        dx = dx if dx is not None or not need_x else dh.new_zeros(dh.shape[0], a.shape[1])
        inputs = x.contiguous() if need_a and x is not None else None
        da = dropped_gradients_(dx if need_x else None, inputs, dh, a, *dropout.rate_and_seed(mask))
        return dx, da
    da = None
    if need_a and x is not None:
        da = (dh.t() @ (x if mask is None else dropout.apply(x, mask))).to(a.dtype)
    if not need_x:
        return None, da
    if dx is not None and mask is None:
        widen_(dx, dh, a.t(), 1.0)
        return dx, da
    part = dh @ a.to(dh.dtype)
    part = part if mask is None else dropout.apply_(part, mask)
    return part if dx is None else dx.add_(part), da
