"""Rotations of activations by small orthogonal blocks, as differences from the identity.

    y_i = x_i + x_i D_i     for the i-th block of x, D (n, b, b) = R − I
    dx_i = dy_i + dy_i D_iᵀ,     dD_i = x_iᵀ dy_i

R of a skew-symmetric Q is Cayley's (I + Q)(I − Q)⁻¹ = I + 2 Q + 2 Q² + …, as it is or the series cut short. Kept as
D, an angle too small for half precision's steps around one is not lost, and no rotation gives the bits of x.

FLOPs: 2 T in b forward, 4 T in b backward. Kept: x, which siblings share, and D. Forward, no copy of x is
permuted; for dD, x and dy are, for a moment: products over many rows of strided blocks take 2.5 to 4 times as long.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from inlay.kernels.choice import fusible, without_autocast

WIDE = 16
"""Blocks smaller than this are multiplied several at a time."""


def rotated(x: Tensor, change: Tensor) -> Tensor:
    """x (…, in) with its blocks rotated by I + D, D (n, b, b); with n = 1, all blocks by the same. In x's dtype."""
    change = packed(change.to(x.dtype))
    if fusible(x, change):
        return cast(Tensor, Rotate.apply(x, change))  # type: ignore[no-untyped-call]
    blocks = in_blocks(x, change)
    return (blocks + torch.einsum("tnk,nkc->tnc", blocks, change)).reshape(x.shape)


class Rotate(torch.autograd.Function):
    """x + x diag(D_1, …, D_n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, change)
        ctx.n, ctx.b = change.shape[:2]
        y = x.clone(memory_format=torch.contiguous_format)
        in_blocks(y, change).transpose(0, 1).baddbmm_(in_blocks(x, change).transpose(0, 1), change)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, change = ctx.saved_tensors
        need_x, need_change = ctx.needs_input_grad
        with without_autocast(dy):
            dx = cast(Tensor, Rotate.apply(dy, change.mT)) if need_x else None  # type: ignore[no-untyped-call]
            if not need_change:
                return dx, None
            by_block = [in_blocks(rows, change).transpose(0, 1).contiguous() for rows in (x, dy)]
            return dx, by_block[0].mT @ by_block[1]


def packed(change: Tensor) -> Tensor:
    """D with neighbouring blocks put into one of up to `WIDE`, zeros around them: fewer, larger products are faster."""
    n, b, _ = change.shape
    times = max([1, *[p for p in range(2, WIDE // b + 1) if n % p == 0]])
    if times == 1:
        return change
    among = torch.eye(times, dtype=change.dtype, device=change.device)[:, None, :, None]
    return (change.reshape(-1, times, b, 1, b) * among).reshape(-1, times * b, times * b)


def in_blocks(x: Tensor, change: Tensor) -> Tensor:
    """(…, in) as (T, n, b); with n = 1, each block of x is a row."""
    return x.reshape(-1, *change.shape[:2])


# -- orthogonal matrices from free numbers -----------------------------------------------------------------------------


def skew(entries: Tensor, size: int) -> Tensor:
    """Q (n, b, b), Q = −Qᵀ, with `entries` (n, b (b − 1) / 2) above the diagonal, row by row."""
    row, column = torch.triu_indices(size, size, 1, device=entries.device)
    upper = entries.new_zeros(entries.shape[0], size * size).index_copy(1, row * size + column, entries)
    upper = upper.view(-1, size, size)
    return upper - upper.mT


def cayley(q: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹ − I for Q (…, b, b): in fp32 at least, where the inverse is exact enough."""
    full = q if q.dtype == torch.float64 else q.float()
    identity = torch.eye(q.shape[-1], dtype=full.dtype, device=q.device)
    return cast(Tensor, torch.linalg.solve(identity - full, 2 * full)).to(q.dtype)  # Q and the inverse commute


def neumann(q: Tensor, terms: int) -> Tensor:
    """2 Q + 2 Q² + … with the last power once, as HF peft cuts the series: `terms` − 1 powers, and 3 for 3 terms.

    With 2 terms, 2 Q.
    """
    if terms < 3:
        return 2 * q
    result: Tensor = 2 * q + q @ q  # from within: Q (2 + Q (2 + Q (… + Q)))
    for _ in range(max(terms - 1, 3) - 2):
        result = 2 * q + q @ result
    return result


def projected(entries: Tensor, eps: float) -> Tensor:
    """Entries of Q (see `skew`) whose Frobenius norm is at most eps / √n; the gradient is that at the projection."""
    with torch.no_grad():
        norm = entries.norm(dim=1, keepdim=True) * 2**0.5
        near = entries * (eps / entries.shape[0] ** 0.5 / norm).clamp(max=1.0)
    result: Tensor = near + (entries - entries.detach())
    return result
