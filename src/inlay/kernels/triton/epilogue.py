"""y += s · h Bᵀ in place: what a low-rank product adds to its host's output (or dh A to the gradient of its input).

    y (T, out), h (T, r), B (out, r) with any strides: for dx += dh A give A.T

Equal to `y.addmm_(h, b.T, alpha=scale)`, rounded once, as there.

FLOPs 2 T r out. Bytes: one read and one write of y, 2 T out e, and h and B for each block (from the cache). The same as
`addmm_` at its best, whose general GEMM is not made for a depth of r; written y + s · (h Bᵀ), it is 6 T out e.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from inlay.kernels.triton import _launch
from inlay.kernels.triton.blocks import add_dot, rounded


def reference(y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same in plain torch."""
    return y.addmm_(h, b.to(y.dtype).T, alpha=scale)


def add_product_(y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """y (T, out) += scale · h (T, r) Bᵀ (r, out), in place; returns y."""
    (rows, columns), rank = y.shape, h.shape[-1]
    _launch.check_rows("y", y, None, None, like=y)
    _launch.check_rows("h", h, rows, None, like=y)
    _launch.check_matrix("B", b, columns, rank, like=y)
    if not y.numel() or not rank:
        return y

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(rows, meta["BLOCK_T"]) * triton.cdiv(columns, meta["BLOCK_O"]),)

    with _launch.on_device(y):
        _add_product[grid](
            y, h, b, scale, rows, columns, rank, y.stride(0), h.stride(0), b.stride(0), b.stride(1),
            _launch.row_class(rows), BLOCK_R=min(_launch.padded(rank), 64), PRECISION=_launch.precision(),
        )  # fmt: skip
    return y


@_launch.tuned(
    [
        triton.Config({"BLOCK_T": 32, "BLOCK_O": 128}, num_warps=4),
        triton.Config({"BLOCK_T": 64, "BLOCK_O": 128}, num_warps=4),
        triton.Config({"BLOCK_T": 64, "BLOCK_O": 256}, num_warps=8),
        triton.Config({"BLOCK_T": 128, "BLOCK_O": 128}, num_warps=8),
    ],
    key=["columns", "rank", "size"],
    small={"BLOCK_T": 16, "BLOCK_O": 32},
    restore=["y"],
)
@triton.jit(do_not_specialize=["size"])
def _add_product(
    y: tl.tensor,
    h: tl.tensor,
    b: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    y_row: tl.tensor,
    h_row: tl.tensor,
    b_row: tl.tensor,
    b_rank: tl.tensor,
    size: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    # Programs that follow each other cover one block of rows, so that writes go along rows.
    blocks = tl.cdiv(columns, BLOCK_O)
    t = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        h_tile = tl.load(h + t[:, None] * h_row + r, (t < rows)[:, None] & (r < rank), 0.0)
        b_tile = tl.load(b + o * b_row + r[:, None] * b_rank, (o < columns) & (r < rank)[:, None], 0.0)
        total = add_dot(total, h_tile, rounded(b_tile, h.dtype.element_ty), PRECISION)
    at, inside = y + t[:, None] * y_row + o, (t < rows)[:, None] & (o < columns)
    sums = tl.load(at, inside, 0.0).to(tl.float32) + scale * total
    tl.store(at, rounded(sums, y.dtype.element_ty), inside)
