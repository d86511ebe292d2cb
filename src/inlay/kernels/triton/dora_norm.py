"""n = ‖W + s · B A‖ for each output, without forming W + s · B A: the norm of DoRA.

    n[o]² = |W[o]|² + Σ_r B[o, r] · (2 s (W Aᵀ)[o, r] + s² (B (A Aᵀ))[o, r])

    W (out, in), A (r, in), B (out, r), n (out) in float32

Equal to `(W + s · B A).norm(dim=1)` in float32: W is taken as it is, and products of other dtypes than W's in three
parts of tf32, which together hold a float32. Where W + s · B A almost vanishes the terms cancel, so n² is held at the
smallest normal number at least. |W|² never changes: taken once, it saves the square of each entry.

FLOPs 2 r in out + 2 r² (in + out). Bytes: one read of W. Unfused in float32 about 32 in out more: W as float32, B A,
s · B A and the sum are written and read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.kernels.triton import _launch
from inlay.kernels.triton.blocks import add_dot

TINY = torch.finfo(torch.float32).tiny


def reference(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same in plain torch, from the matrix itself."""
    norms: Tensor = torch.linalg.vector_norm(w.float() + scale * (b.float() @ a.float()), dim=1)
    return norms


def row_norms(w: Tensor, a: Tensor, b: Tensor, scale: float, w_squared: Tensor | None = None) -> Tensor:
    """‖W + scale · B A‖ for each row, (out,) in float32; `w_squared` (out,) in float32 is |W|² where it is known."""
    (rows, columns), rank = w.shape, a.shape[0]
    _launch.check_rows("W", w, None, None, like=w)
    _launch.check_matrix("A", a, None, columns, like=w)
    _launch.check_matrix("B", b, rows, rank, like=w)
    _launch.check_rank(rank, like=w)
    if w_squared is not None:
        _launch.check_vector("w_squared", w_squared, rows, like=w)
    out = torch.empty(rows, dtype=torch.float32, device=w.device)
    if not rows:
        return out
    gram = a.float() @ a.float().T

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(rows, meta["BLOCK_O"]),)

    with _launch.on_device(w):
        _row_norms[grid](
            w, a, b, gram, out if w_squared is None else w_squared, out, scale, rows, columns, rank, w.stride(0),
            a.stride(0), a.stride(1), b.stride(0), b.stride(1), BLOCK_R=_launch.padded(rank), BLOCK_K=16, TINY=TINY,
            SQUARED=w_squared is not None, EXACT=w.dtype == a.dtype and w.dtype != torch.float32,
        )  # fmt: skip
    return out


@_launch.tuned(
    [
        triton.Config({"BLOCK_O": 16, "BLOCK_I": 32}, num_warps=4, num_stages=2),  # fits whatever the rank
        triton.Config({"BLOCK_O": 16, "BLOCK_I": 128}, num_warps=4, num_stages=4),
        triton.Config({"BLOCK_O": 32, "BLOCK_I": 128}, num_warps=4, num_stages=4),
        triton.Config({"BLOCK_O": 64, "BLOCK_I": 64}, num_warps=4, num_stages=4),
        triton.Config({"BLOCK_O": 64, "BLOCK_I": 128}, num_warps=8, num_stages=3),
    ],
    key=["rows", "columns", "rank", "EXACT"],
    small={"BLOCK_O": 16, "BLOCK_I": 32},
)
@triton.jit
def _row_norms(
    w: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    gram: tl.tensor,
    squared: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    w_row: tl.tensor,
    a_row: tl.tensor,
    a_column: tl.tensor,
    b_row: tl.tensor,
    b_rank: tl.tensor,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TINY: tl.constexpr,
    SQUARED: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    o, r = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_R)
    product = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    norm = tl.zeros((BLOCK_O,), tl.float32)
    for first in range(0, columns, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        w_tile = tl.load(w + o[:, None] * w_row + i, (o < rows)[:, None] & (i < columns), 0.0)
        a_tile = tl.load(a + r * a_row + i[:, None] * a_column, (r < rank) & (i < columns)[:, None], 0.0)
        full = w_tile.to(tl.float32)
        if EXACT:  # products of 16-bit numbers are exact in the float32 sum
            product = add_dot(product, w_tile, a_tile, "ieee")
        else:
            product = add_dot(product, full, a_tile.to(tl.float32), "tf32x3")
        if not SQUARED:
            norm += tl.sum(full * full, 1)
    if SQUARED:
        norm = tl.load(squared + o, o < rows, 0.0)
    change = 2 * scale * product
    for first in range(0, rank, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        gram_tile = tl.load(gram + k[:, None] * rank + r, (k < rank)[:, None] & (r < rank), 0.0)
        b_part = tl.load(b + o[:, None] * b_row + k * b_rank, (o < rows)[:, None] & (k < rank), 0.0).to(tl.float32)
        change = add_dot(change, scale * scale * b_part, gram_tile, "tf32x3")
    b_tile = tl.load(b + o[:, None] * b_row + r * b_rank, (o < rows)[:, None] & (r < rank), 0.0).to(tl.float32)
    norm += tl.sum(b_tile * change, 1)
    tl.store(out + o, tl.sqrt(tl.maximum(norm, TINY)), o < rows)
