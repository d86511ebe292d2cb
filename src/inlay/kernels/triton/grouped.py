"""A low-rank product with another adapter for each row: batches that mix adapters.

    y[t] += s[k] · B[k] (A[k] x[t]),      k = index[t];      rows with k = −1 take none

    x (T, in), y (T, out), A (n, r, in) and B (n, out, r) with any strides, s (n,) float32, index (T,)

Equal to that formula row by row, h = A x kept in float32 until it is scaled and rounded once. The backward of dx is the
same product with B.mT and A.mT for A and B.

Rows are grouped by adapter once a batch (`group_rows`), for all its linears, without waiting for the device: blocks of
rows that share an adapter, at most T / rows + n of them. Then two kernels: h of each block, and its product with B.

FLOPs 2 T r (in + out). Bytes: x read, y read and written, and A and B read once for each block of their rows. Unfused,
A[k] and B[k] are copied for each row and read by a batched GEMM: 3 T r (in + out) e more, far above x and y themselves.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.errors import ConfigError
from inlay.kernels.triton import _launch
from inlay.kernels.triton.blocks import add_dot, rounded

LONGEST_BLOCK = 128 if not _launch.INTERPRETED else 32


@dataclasses.dataclass(frozen=True)
class RowGroups:
    """Blocks of rows that share an adapter. Row `order[i]` is of the block b with start[b] ≤ i < stop[b]."""

    order: Tensor
    """The rows sorted by adapter, (T,) int64."""
    adapter: Tensor
    """The adapter of each block, int64; a block that was not needed has no rows."""
    start: Tensor
    stop: Tensor
    adapters: int
    rows: int
    """The most rows of a block."""


def group_rows(index: Tensor, adapters: int, rows: int | None = None) -> RowGroups:
    """Group rows by `index` (T,), each from −1 (no adapter) to adapters − 1; `rows` of a block, 16, 32, 64 or 128."""
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ConfigError(f"index is {index.dtype} of shape {tuple(index.shape)}; give a vector of whole numbers")
    if rows is None:
        rows = 64 if len(index) >= 64 * adapters else 16
    if rows not in (16, 32, 64, 128):
        raise ConfigError(f"blocks of {rows} rows are not supported; give 16, 32, 64 or 128")
    index = index.long()
    order = index.argsort(stable=True)
    counts = torch.zeros(adapters + 1, dtype=torch.int64, device=index.device)
    counts.scatter_add_(0, index + 1, torch.ones_like(index))
    first = counts.cumsum(0)[:-1]  # of each adapter's rows, after those without one
    blocks = (counts[1:] + rows - 1) // rows
    past = blocks.cumsum(0)
    number = torch.arange(len(index) // rows + min(adapters, len(index)), device=index.device)
    adapter = torch.searchsorted(past, number, right=True)
    used = adapter < adapters
    adapter = adapter.clamp_max(adapters - 1)
    start = first[adapter] + (number - (past - blocks)[adapter]) * rows
    stop = torch.minimum(start + rows, first[adapter] + counts[1:][adapter])
    return RowGroups(order, adapter, start, torch.where(used, stop, start), adapters, rows)


def reference(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, index: Tensor) -> Tensor:
    """The same in plain torch, in place."""
    used = index >= 0
    picked = index[used].long()
    h = torch.einsum("ti,tri->tr", x[used].float(), a.to(x.dtype)[picked].float()) * scales[picked, None]
    change = torch.einsum("tr,tor->to", h.to(y.dtype).float(), b.to(y.dtype)[picked].float())
    y[used] = (y[used].float() + change).to(y.dtype)
    return y


def add_grouped_product_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, groups: RowGroups) -> Tensor:
    """y[t] += s[k] · B[k] A[k] x[t] in place, with the adapter k of each row in `groups`; returns y."""
    (rows, columns), outputs = x.shape, y.shape[1]
    rank = a.shape[1]
    _launch.check_rows("x", x, len(groups.order), None, like=x)
    _launch.check_rows("y", y, rows, None, like=x)
    _launch.check_vector("scales", scales, groups.adapters, like=x)
    for name, tensor, shape in (("A", a, (rank, columns)), ("B", b, (outputs, rank))):
        if tensor.dim() != 3 or len(tensor) != groups.adapters:
            raise ConfigError(f"{name} has the shape {tuple(tensor.shape)}; give {(groups.adapters, *shape)}")
        _launch.check_matrix(name, tensor[0], *shape, like=x)
    _launch.check_rank(rank, like=x)
    blocks = len(groups.adapter)
    if not blocks or not x.numel() or not y.numel() or not rank:
        return y
    run = _launch.run(columns, LONGEST_BLOCK, triton.cdiv(2 * _launch.processors(x), blocks))
    runs = triton.cdiv(columns, run)
    h = torch.empty(runs, rows, rank, dtype=torch.float32, device=x.device)
    plan = (groups.order, groups.adapter, groups.start, groups.stop)
    meta = {"ROWS": groups.rows, "BLOCK_R": _launch.padded(rank), "PRECISION": _launch.precision()}

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return blocks, triton.cdiv(outputs, meta["BLOCK_O"])

    with _launch.on_device(x):
        _narrow[(blocks, runs)](x, a, h, *plan, rows, columns, rank, x.stride(0), *a.stride(), run, **meta)
        _widen[grid](
            y, h, b, scales, *plan, rows, outputs, rank, runs, y.stride(0), *b.stride(), **meta
        )  # fmt: skip
    return y


@_launch.tuned(
    [
        triton.Config({"BLOCK_I": 32}, num_warps=4, num_stages=2),  # fits whatever the rank
        triton.Config({"BLOCK_I": 64}, num_warps=4, num_stages=3),
        triton.Config({"BLOCK_I": 128}, num_warps=4, num_stages=3),
        triton.Config({"BLOCK_I": 128}, num_warps=8, num_stages=2),
    ],
    key=["columns", "rank", "ROWS"],
    small={"BLOCK_I": 16},
)
@triton.jit
def _narrow(
    x: tl.tensor,
    a: tl.tensor,
    h: tl.tensor,
    order: tl.tensor,
    adapter: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    x_row: tl.tensor,
    a_adapter: tl.tensor,
    a_row: tl.tensor,
    a_column: tl.tensor,
    run: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """h[run, place] = A x[order[place]] over one run of columns, for the places of one block."""
    block, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place, end = tl.load(start + block) + tl.arange(0, ROWS), tl.load(stop + block)
    a += tl.load(adapter + block) * a_adapter
    t, r = tl.load(order + place, place < end, 0), tl.arange(0, BLOCK_R)
    total = tl.zeros((ROWS, BLOCK_R), tl.float32)
    if tl.load(start + block) < end:
        for first in range(0, run, BLOCK_I):
            i = part * run + first + tl.arange(0, BLOCK_I)
            x_tile = tl.load(x + t[:, None] * x_row + i, (place < end)[:, None] & (i < columns), 0.0)
            a_tile = tl.load(a + r * a_row + i[:, None] * a_column, (r < rank) & (i < columns)[:, None], 0.0)
            total = add_dot(total, x_tile, rounded(a_tile, x.dtype.element_ty), PRECISION)
        tl.store(h + (part * rows + place[:, None]) * rank + r, total, (place < end)[:, None] & (r < rank))


@_launch.tuned(
    [
        triton.Config({"BLOCK_O": 64}, num_warps=4),
        triton.Config({"BLOCK_O": 128}, num_warps=4),
        triton.Config({"BLOCK_O": 256}, num_warps=8),
    ],
    key=["outputs", "rank", "ROWS"],
    small={"BLOCK_O": 32},
    restore=["y"],
)
@triton.jit
def _widen(
    y: tl.tensor,
    h: tl.tensor,
    b: tl.tensor,
    scales: tl.tensor,
    order: tl.tensor,
    adapter: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    rank: tl.tensor,
    runs: tl.tensor,
    y_row: tl.tensor,
    b_adapter: tl.tensor,
    b_row: tl.tensor,
    b_rank: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """y[order[place]] += B (s · Σ h[run, place]) for the places of one block and one block of outputs."""
    block = tl.program_id(0)
    place, end = tl.load(start + block) + tl.arange(0, ROWS), tl.load(stop + block)
    number = tl.load(adapter + block)
    t, r = tl.load(order + place, place < end, 0), tl.arange(0, BLOCK_R)
    o = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    if tl.load(start + block) < end:
        total = tl.zeros((ROWS, BLOCK_R), tl.float32)
        for part in range(runs):
            at = (part * rows.to(tl.int64) + place[:, None]) * rank + r
            total += tl.load(h + at, (place < end)[:, None] & (r < rank), 0.0)
        h_tile = rounded(total * tl.load(scales + number), y.dtype.element_ty)
        held = (o < outputs) & (r < rank)[:, None]
        b_tile = tl.load(b + number * b_adapter + o * b_row + r[:, None] * b_rank, held, 0.0)
        product = add_dot(tl.zeros((ROWS, BLOCK_O), tl.float32), h_tile, rounded(b_tile, y.dtype.element_ty), PRECISION)
        at, inside = y + t[:, None] * y_row + o, (place < end)[:, None] & (o < outputs)
        tl.store(at, rounded(tl.load(at, inside, 0.0).to(tl.float32) + product, y.dtype.element_ty), inside)
