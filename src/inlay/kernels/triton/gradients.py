"""dh = s · dy B and dB = s · dyᵀ h from one read of dy: the backward of y += s · h Bᵀ.

    dy (T, out), h (T, r), B (out, r)

Equal to `scale * (dy @ b)` and `scale * (dy.T @ h)`, summed in float32 and rounded once: a float32 master gets a
float32 gradient, where a GEMM in bf16 would round it.

Each program keeps a block of `out` for a run of rows: it holds dB of that block in registers, and leaves the part of
dh that the block gives. Parts are added by `partial_sums`, in a fixed order.

FLOPs 4 T r out. Bytes: one read of dy, T out e, and the parts, written and read in float32: 8 r T out (1 / block +
1 / run), at r = 16 in bf16 with blocks of 256 and runs of 512 less than 0.4 of dy's own, and mostly within the cache.
Unfused: two reads of dy. The parts grow with r, while the block that fits shrinks: see `MOST_RANK`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.kernels.triton import _launch
from inlay.kernels.triton.blocks import add_dot, rounded
from inlay.kernels.triton.partial_sums import sum_parts

MOST_RANK = 32
"""The rank up to which this moves fewer bytes than two products do; beyond it is right, and slower."""
LONGEST_BLOCK = 128 if not _launch.INTERPRETED else 16
"""Runs of rows are multiples of this, the largest block of rows that the tuner may choose."""


def reference(dy: Tensor, h: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    return (dy @ b.to(dy.dtype)).mul(scale), (dy.T @ h).mul(scale).to(b.dtype)


def product_gradients(dy: Tensor, h: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(dh (T, r) in the dtype of dy, dB (out, r) in the dtype of B)."""
    (rows, columns), rank = dy.shape, h.shape[-1]
    _launch.check_rows("dy", dy, None, None, like=dy)
    _launch.check_rows("h", h, rows, None, like=dy)
    _launch.check_matrix("B", b, columns, rank, like=dy)
    _launch.check_rank(rank, like=dy)
    if not dy.numel() or not rank:
        return dy.new_zeros(rows, rank), b.new_zeros(columns, rank)
    block = _columns_held(rank)
    blocks = triton.cdiv(columns, block)
    run = _launch.run(rows, LONGEST_BLOCK, triton.cdiv(2 * _launch.processors(dy), blocks))
    runs = triton.cdiv(rows, run)
    dh = torch.empty(blocks, rows, rank, dtype=torch.float32, device=dy.device)
    db = torch.empty(runs, columns, rank, dtype=torch.float32, device=dy.device)
    with _launch.on_device(dy):
        _gradients[(blocks, runs)](
            dy, h, b, dh, db, rows, columns, rank, dy.stride(0), h.stride(0), b.stride(0), b.stride(1), run,
            _launch.row_class(rows), BLOCK_O=block, BLOCK_R=_launch.padded(rank), PRECISION=_launch.precision(),
        )  # fmt: skip
    return sum_parts(dh, scale, dy.dtype), sum_parts(db, scale, b.dtype)


def _columns_held(rank: int) -> int:
    """How many columns of dy a program holds: fewer where their dB, (columns, r) in float32, would spill."""
    if _launch.INTERPRETED:
        return 32
    return max(64, min(256, 8192 // _launch.padded(rank)))


@_launch.tuned(
    [
        triton.Config({"BLOCK_T": 32}, num_warps=8, num_stages=2),  # fits whatever the rank
        triton.Config({"BLOCK_T": 32}, num_warps=4, num_stages=4),
        triton.Config({"BLOCK_T": 64}, num_warps=4, num_stages=3),
        triton.Config({"BLOCK_T": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_T": 128}, num_warps=8, num_stages=2),
    ],
    key=["columns", "rank", "size"],
    small={"BLOCK_T": 16},
)
@triton.jit(do_not_specialize=["size"])
def _gradients(
    dy: tl.tensor,
    h: tl.tensor,
    b: tl.tensor,
    dh: tl.tensor,
    db: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    dy_row: tl.tensor,
    h_row: tl.tensor,
    b_row: tl.tensor,
    b_rank: tl.tensor,
    run: tl.tensor,
    size: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o, r = block * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_R)
    held = (o < columns)[:, None] & (r < rank)
    b_tile = rounded(tl.load(b + o[:, None] * b_row + r * b_rank, held, 0.0), dy.dtype.element_ty)
    total = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for first in range(0, run, BLOCK_T):
        t = part * run + first + tl.arange(0, BLOCK_T)
        inside = (t < rows)[:, None] & (r < rank)
        dy_tile = tl.load(dy + t[:, None] * dy_row + o, (t < rows)[:, None] & (o < columns), 0.0)
        h_tile = tl.load(h + t[:, None] * h_row + r, inside, 0.0)
        total = add_dot(total, tl.trans(dy_tile), h_tile, PRECISION)
        product = add_dot(tl.zeros((BLOCK_T, BLOCK_R), tl.float32), dy_tile, b_tile, PRECISION)
        tl.store(dh + (block * rows + t[:, None]) * rank + r, product, inside)
    tl.store(db + (part * columns + o[:, None]) * rank + r, total, held)
