"""LoRA's dropout with no mask stored: the mask m is drawn from its seed wherever it is used.

    h = x̃ Aᵀ,      dA = dhᵀ x̃,      dx += (dh A) ⊙ m,      x̃ = x ⊙ m

    x (T, in), A (r, in), h and dh (T, r), m = `philox.reference(T, in, p, seed)`

The factor 1 / (1 − p) is the caller's: it folds into the scale s of the product. Equal to the same three lines in plain
torch with that mask. With p = 0 nothing is drawn.

FLOPs 2 T r in for h, 4 T r in for dA and dx, and 10 integer operations for each entry each time. Bytes: h reads x;
dA and dx together read x and dx and write dx: 4 T in e in all, and small parts. Unfused T in (12 e + 4), with a mask of
one byte an entry, kept: it is written once and read thrice; x̃ is made twice (3 e each time, with its product's
read of it), the product dh A is written, masked and added (6 e).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.kernels.triton import _launch, philox
from inlay.kernels.triton.blocks import add_dot, rounded
from inlay.kernels.triton.partial_sums import sum_parts

LONGEST_BLOCK = 128 if not _launch.INTERPRETED else 32
"""Runs of rows or columns are multiples of this, the largest block that the tuner may choose."""


def reference_product(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """h in plain torch."""
    return (x * philox.reference(x.shape[0], x.shape[1], p, seed, x.device)) @ a.to(x.dtype).T


def reference_gradients(dx: Tensor, x: Tensor, dh: Tensor, a: Tensor, p: float, seed: int) -> tuple[Tensor, Tensor]:
    """(dx, dA) in plain torch; dx is changed in place."""
    mask = philox.reference(x.shape[0], x.shape[1], p, seed, x.device)
    return dx.add_((dh @ a.to(dh.dtype)) * mask), (dh.T @ (x * mask)).to(a.dtype)


def dropped_product(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """h = (x ⊙ m) Aᵀ, (T, r) in the dtype of x; `seed` from 0 to 2⁶³ − 1."""
    (rows, columns), rank = x.shape, a.shape[0]
    _launch.check_rows("x", x, None, None, like=x)
    _launch.check_matrix("A", a, rank, columns, like=x)
    _launch.check_rank(rank, like=x)
    level = philox.threshold(p)
    if not x.numel() or not rank:
        return x.new_zeros(rows, rank)
    run = _launch.run(columns, LONGEST_BLOCK, triton.cdiv(2 * _launch.processors(x), triton.cdiv(rows, 64)))
    runs = triton.cdiv(columns, run)
    parts = torch.empty(runs, rows, rank, dtype=torch.float32, device=x.device)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK_T"]), runs

    with _launch.on_device(x):
        _dropped_product[grid](
            x, a, parts, seed, level, rows, columns, rank, x.stride(0), a.stride(0), a.stride(1), run,
            _launch.row_class(rows), BLOCK_R=_launch.padded(rank), DROP=level > 0, PRECISION=_launch.precision(),
        )  # fmt: skip
    return sum_parts(parts, 1.0, x.dtype)


def dropped_gradients_(
    dx: Tensor | None, x: Tensor | None, dh: Tensor, a: Tensor, p: float, seed: int
) -> Tensor | None:
    """dx (T, in) += (dh A) ⊙ m in place, and dA = dhᵀ (x ⊙ m), (r, in) in the dtype of A.

    Without dx only dA is taken; without x only dx, and None is returned.
    """
    (rows, rank), columns = dh.shape, a.shape[1]
    _launch.check_rows("dh", dh, None, None, like=dh)
    _launch.check_matrix("A", a, rank, columns, like=dh)
    for name, tensor in (("dx", dx), ("x", x)):
        if tensor is not None:
            _launch.check_rows(name, tensor, rows, columns, like=dh)
    _launch.check_rank(rank, like=dh)
    level = philox.threshold(p)
    if (dx is None and x is None) or not rows * columns * rank:
        return None if x is None else torch.zeros_like(a)
    block = 64 if not _launch.INTERPRETED else 32
    blocks = triton.cdiv(columns, block)
    run = _launch.run(rows, LONGEST_BLOCK, triton.cdiv(4 * _launch.processors(dh), blocks))
    runs = triton.cdiv(rows, run)
    parts = torch.empty(runs if x is not None else 0, rank, columns, dtype=torch.float32, device=dh.device)
    # An operand that is not there is not touched either; something has to stand in its place.
    dx_, x_ = dh if dx is None else dx, dh if x is None else x
    with _launch.on_device(dh):
        _dropped_gradients[(blocks, runs)](
            dx_, x_, dh, a, parts, seed, level, rows, columns, rank, dx_.stride(0), x_.stride(0), dh.stride(0),
            a.stride(0), a.stride(1), run, _launch.row_class(rows), BLOCK_C=block, BLOCK_R=_launch.padded(rank),
            DROP=level > 0, NEED_X=dx is not None, NEED_A=x is not None, PRECISION=_launch.precision(),
        )  # fmt: skip
    return None if x is None else sum_parts(parts, 1.0, a.dtype)


@_launch.tuned(
    [
        triton.Config({"BLOCK_T": 32, "BLOCK_C": 32}, num_warps=4, num_stages=2),  # fits whatever the rank
        triton.Config({"BLOCK_T": 32, "BLOCK_C": 128}, num_warps=4, num_stages=3),
        triton.Config({"BLOCK_T": 64, "BLOCK_C": 64}, num_warps=4, num_stages=3),
        triton.Config({"BLOCK_T": 64, "BLOCK_C": 128}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_T": 128, "BLOCK_C": 64}, num_warps=8, num_stages=3),
    ],
    key=["columns", "rank", "size", "DROP"],
    small={"BLOCK_T": 16, "BLOCK_C": 16},
)
@triton.jit(do_not_specialize=["size", "seed", "level"])
def _dropped_product(
    x: tl.tensor,
    a: tl.tensor,
    parts: tl.tensor,
    seed: tl.tensor,
    level: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    x_row: tl.tensor,
    a_row: tl.tensor,
    a_column: tl.tensor,
    run: tl.tensor,
    size: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    part, r = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, run, BLOCK_C):
        first = part * run + start
        c = first + tl.arange(0, BLOCK_C)
        x_tile = tl.load(x + t[:, None] * x_row + c, (t < rows)[:, None] & (c < columns), 0.0)
        a_tile = tl.load(a + r * a_row + c[:, None] * a_column, (r < rank) & (c < columns)[:, None], 0.0)
        if DROP:
            x_tile = tl.where(philox.kept(seed, t, first, level, BLOCK_C), x_tile, 0.0)
        total = add_dot(total, x_tile, rounded(a_tile, x.dtype.element_ty), PRECISION)
    tl.store(parts + (part * rows + t[:, None]) * rank + r, total, (t < rows)[:, None] & (r < rank))


@_launch.tuned(
    [
        triton.Config({"BLOCK_T": 32}, num_warps=8, num_stages=2),  # fits whatever the rank
        triton.Config({"BLOCK_T": 32}, num_warps=4, num_stages=3),
        triton.Config({"BLOCK_T": 64}, num_warps=4, num_stages=3),
        triton.Config({"BLOCK_T": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_T": 128}, num_warps=8, num_stages=2),
    ],
    key=["columns", "rank", "size", "DROP", "NEED_X", "NEED_A"],
    small={"BLOCK_T": 16},
    restore=["dx"],
)
@triton.jit(do_not_specialize=["size", "seed", "level"])
def _dropped_gradients(
    dx: tl.tensor,
    x: tl.tensor,
    dh: tl.tensor,
    a: tl.tensor,
    parts: tl.tensor,
    seed: tl.tensor,
    level: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    dx_row: tl.tensor,
    x_row: tl.tensor,
    dh_row: tl.tensor,
    a_row: tl.tensor,
    a_column: tl.tensor,
    run: tl.tensor,
    size: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROP: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_A: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    first, part = tl.program_id(0).to(tl.int64) * BLOCK_C, tl.program_id(1).to(tl.int64)
    c, r = first + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    held = (r < rank)[:, None] & (c < columns)
    a_tile = rounded(tl.load(a + r[:, None] * a_row + c * a_column, held, 0.0), dh.dtype.element_ty)
    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for start in range(0, run, BLOCK_T):
        t = part * run + start + tl.arange(0, BLOCK_T)
        inside = (t < rows)[:, None] & (c < columns)
        keep = inside
        if DROP:
            keep = inside & philox.kept(seed, t, first, level, BLOCK_C)
        dh_tile = tl.load(dh + t[:, None] * dh_row + r, (t < rows)[:, None] & (r < rank), 0.0)
        if NEED_A:
            x_tile = tl.where(keep, tl.load(x + t[:, None] * x_row + c, inside, 0.0), 0.0)
            total = add_dot(total, tl.trans(x_tile), dh_tile, PRECISION)
        if NEED_X:
            product = add_dot(tl.zeros((BLOCK_T, BLOCK_C), tl.float32), dh_tile, a_tile, PRECISION)
            product = tl.where(keep, product, 0.0)
            at = dx + t[:, None] * dx_row + c
            tl.store(at, rounded(tl.load(at, inside, 0.0).to(tl.float32) + product, dx.dtype.element_ty), inside)
    if NEED_A:
        tl.store(parts + (part * rank + r) * columns + c[:, None], total, (c < columns)[:, None] & (r < rank))
