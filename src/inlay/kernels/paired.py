"""Pairs of entries turned and scaled, for RoAD: entry j of a group with entry j + h, where the group has 2 h.

    y_j = a_j z_j − s_j z_{j+h},     y_{j+h} = a_{j+h} z_{j+h} + s_{j+h} z_j
    dz_j = a_j dy_j + s_{j+h} dy_{j+h},   dz_{j+h} = a_{j+h} dy_{j+h} − s_j dy_j,   da = Σ_t dy ⊙ z,   ds likewise

As z + (a − 1) ⊙ z …, so that a change of a near one is not lost to half precision, and none gives the bits of z.

FLOPs: 4 T n forward, 8 T n backward. Kept: z (T, n).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from inlay.kernels.choice import fusible, without_autocast
from inlay.kernels.lora import rows


def turned(z: Tensor, a: Tensor, s: Tensor, half: int) -> Tensor:
    """z (…, n) turned in pairs by a and s (n), which are of higher precision or the same, in the dtype of z."""
    if fusible(z, a, s):
        return cast(Tensor, Turn.apply(z, a, s, half))  # type: ignore[no-untyped-call]
    first, second = halves(z, half)
    swapped = torch.stack((-second, first), dim=-2).reshape(z.shape)
    return (z + (a - 1) * z + s * swapped).to(z.dtype)


class Turn(torch.autograd.Function):
    """a ⊙ z + s ⊙ (−z_{j+h}, z_j)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, a: Tensor, s: Tensor, half: int) -> Tensor:
        ctx.half = half
        ctx.save_for_backward(z if any(ctx.needs_input_grad[1:]) else None, a, s)
        left, right = halves(s.to(z.dtype), half)
        return mixed(z, (a - 1).to(z.dtype), -left, right, half)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, a, s = ctx.saved_tensors
        dz = da = ds = None
        with without_autocast(dy):
            if ctx.needs_input_grad[0]:
                left, right = halves(s.to(dy.dtype), ctx.half)
                dz = mixed(dy, (a - 1).to(dy.dtype), right, -left, ctx.half)
            if ctx.needs_input_grad[1]:
                da = rows(dy * z).sum(0, dtype=a.dtype)
            if ctx.needs_input_grad[2]:
                (up, down), (first, second) = halves(rows(dy), ctx.half), halves(rows(z), ctx.half)
                left, right = (-up * second).sum(0, dtype=s.dtype), (down * first).sum(0, dtype=s.dtype)
                ds = torch.stack((left, right), dim=1).flatten()
        return dz, da, ds, None


def mixed(z: Tensor, shift: Tensor, from_second: Tensor, from_first: Tensor, half: int) -> Tensor:
    """z + shift ⊙ z, and to each half what the other gives."""
    y = torch.addcmul(z, z, shift)
    (one, two), (first, second) = halves(y, half), halves(z, half)
    one.addcmul_(second, from_second)
    two.addcmul_(first, from_first)
    return y


def halves(z: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """(…, n) as two (…, groups, h), views."""
    groups: Tensor = z.unflatten(-1, (-1, 2, half))  # type: ignore[no-untyped-call]
    return groups.select(-2, 0), groups.select(-2, 1)
