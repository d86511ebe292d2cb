"""4-bit weights in the layout of bitsandbytes: decoded alone, or within y = x Wᵀ for few rows.

    W[o, i] = table[code] · absmax[block],      two codes a byte, the high nibble first; blocks of 64 along a row
    absmax[block] = levels[absmax8[block]] · absmax2[block / 256] + offset           where it is quantised itself

Equal to `bitsandbytes.functional.dequantize_4bit`: in float32 to the bit, in 16 bits rounded once; the product equals
x Wᵀ of that W. NF4 and FP4 differ in the table only.

Bytes: decoding reads 0.5 + 4/64 (or 1/64) byte an entry and writes e. Fused, y = x Wᵀ reads only those 0.52 byte, where
unfused it is 0.52 + 2 e, at e = 2 nine times as many. FLOPs 2 T in out, and a look-up and a product an entry. It pays
while the product is bound by reading W; beyond `MOST_ROWS` rows W is decoded and the product left to torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from inlay.errors import ConfigError
from inlay.kernels.triton import _launch
from inlay.kernels.triton.blocks import add_dot, rounded
from inlay.kernels.triton.partial_sums import sum_parts

MOST_ROWS = 64
"""Rows up to which decoding within the product is taken."""
LONGEST_BLOCK = 4
"""Runs of blocks along a row are multiples of this, the most that the tuner may take at once."""


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A 4-bit weight of this shape: what `bitsandbytes.functional.quantize_4bit` gives, taken apart."""

    codes: Tensor
    """uint8, ⌈out · in / 2⌉ of them in any shape."""
    absmax: Tensor
    """One for each block: float32, or uint8 where quantised itself."""
    table: Tensor
    """The 16 values, float32."""
    shape: tuple[int, int]
    block: int = 64
    levels: Tensor | None = None
    """The 256 values of a quantised absmax, float32; with them `absmax2`, `offset` and `block2`."""
    absmax2: Tensor | None = None
    offset: Tensor | None = None
    block2: int = 256

    @classmethod
    def from_bitsandbytes(cls, codes: Tensor, state: Any) -> Self:
        """From the data of a `Params4bit` and its `quant_state`."""
        inner = state.state2 if state.nested else None
        return cls(
            codes,
            state.absmax,
            state.code,
            tuple(state.shape),
            state.blocksize,
            levels=None if inner is None else inner.code,
            absmax2=None if inner is None else inner.absmax,
            offset=None if inner is None else state.offset,
            block2=256 if inner is None else inner.blocksize,
        )

    def __post_init__(self) -> None:
        """Raise ConfigError where the parts do not fit together."""
        entries = self.shape[0] * self.shape[1]
        if self.block < 32 or self.block & (self.block - 1):
            raise ConfigError(f"blocks of {self.block} entries are not supported; quantise in blocks of a power of two")
        blocks, nested = -(-entries // self.block), self.levels is not None
        sizes: dict[str, tuple[Tensor | None, int, torch.dtype]] = {
            "codes": (self.codes, -(-entries // 2), torch.uint8),
            "absmax": (self.absmax, blocks, torch.uint8 if nested else torch.float32),
            "table": (self.table, 16, torch.float32),
        }
        if nested:
            sizes["levels"] = (self.levels, 256, torch.float32)
            sizes["absmax2"] = (self.absmax2, -(-blocks // self.block2), torch.float32)
            sizes["offset"] = (self.offset, 1, torch.float32)
        for name, (tensor, size, dtype) in sizes.items():
            if tensor is None or tensor.numel() != size or tensor.dtype != dtype or not tensor.is_contiguous():
                found = "is not given" if tensor is None else f"has {tensor.numel()} entries of {tensor.dtype}"
                raise ConfigError(
                    f"{name} of a 4-bit weight {self.shape} {found}; it takes {size} contiguous ones of {dtype}"
                )

    def operands(self) -> tuple[Tensor, ...]:
        """The tensors as the kernels take them; absmax stands in for what is not there."""
        nested = (self.levels, self.absmax2, self.offset)
        return (self.codes, self.absmax, self.table, *(self.absmax if part is None else part for part in nested))


def reference(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """W (out, in) in plain torch."""
    pairs = weight.codes.flatten().long()
    values = weight.table[torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: weight.shape[0] * weight.shape[1]]]
    absmax = weight.absmax
    if weight.levels is not None and weight.absmax2 is not None and weight.offset is not None:
        outer = weight.absmax2.repeat_interleave(weight.block2)[: absmax.numel()]
        absmax = weight.levels[absmax.long()] * outer + weight.offset
    scales = absmax.repeat_interleave(weight.block)[: values.numel()]
    return (values * scales).to(dtype).view(weight.shape)


def decode(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """W (out, in) in this dtype."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    blocks = weight.absmax.numel()
    if blocks:

        def grid(meta: dict[str, Any]) -> tuple[int]:
            return (triton.cdiv(blocks, meta["BLOCKS"]),)

        with _launch.on_device(out):
            _decode[grid](
                *weight.operands(), out, out.numel(), weight.block2, SIZE=weight.block,
                NESTED=weight.levels is not None,
            )  # fmt: skip
    return out


def linear(x: Tensor, weight: Quantised) -> Tensor:
    """y = x Wᵀ for x (T, in): (T, out) in the dtype of x, of W rounded to that dtype."""
    rows, (outputs, columns) = x.shape[0], weight.shape
    _launch.check_rows("x", x, None, columns, like=x)
    _launch.check_device("x", x, like=weight.codes)
    if rows > MOST_ROWS or columns % weight.block or not x.numel():
        return F.linear(x, decode(weight, x.dtype))
    along, block = columns // weight.block, 64 if not _launch.INTERPRETED else 16
    run = _launch.run(along, LONGEST_BLOCK, triton.cdiv(4 * _launch.processors(x), triton.cdiv(outputs, block)))
    runs = triton.cdiv(along, run)
    parts = torch.empty(runs, rows, outputs, dtype=torch.float32, device=x.device)
    with _launch.on_device(x):
        _linear[(triton.cdiv(outputs, block), runs)](
            x, *weight.operands(), parts, rows, outputs, along, x.stride(0), weight.block2, run, SIZE=weight.block,
            NESTED=weight.levels is not None, BLOCK_T=_launch.padded(rows), BLOCK_O=block,
            PRECISION=_launch.precision(),
        )  # fmt: skip
    return sum_parts(parts, 1.0, x.dtype)


@triton.jit
def _scales(
    absmax: tl.tensor,
    levels: tl.tensor,
    absmax2: tl.tensor,
    offset: tl.tensor,
    block2: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    NESTED: tl.constexpr,
) -> tl.tensor:
    """absmax of the blocks `at`, in float32."""
    scale = tl.load(absmax + at, inside, 0)
    if NESTED:
        scale = tl.load(levels + scale, inside, 0.0) * tl.load(absmax2 + at // block2, inside, 0.0) + tl.load(offset)
    return scale


@triton.jit
def _values(codes: tl.tensor, table: tl.tensor) -> tl.tensor:
    """The two values of each byte, in a new last dimension."""
    return tl.join(tl.load(table + (codes >> 4)), tl.load(table + (codes & 15)))


@_launch.tuned(
    [triton.Config({"BLOCKS": blocks}, num_warps=4) for blocks in (32, 64, 128)], key=["size"], small={"BLOCKS": 4}
)
@triton.jit
def _decode(
    codes: tl.tensor,
    absmax: tl.tensor,
    table: tl.tensor,
    levels: tl.tensor,
    absmax2: tl.tensor,
    offset: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    block2: tl.tensor,
    SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = _scales(absmax, levels, absmax2, offset, block2, block, block * SIZE < size, NESTED)
    byte = block[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)
    values = _values(tl.load(codes + byte, 2 * byte < size, 0), table)
    entry = block[:, None] * SIZE + tl.arange(0, SIZE)
    entries = tl.reshape(values, (BLOCKS, SIZE)) * scale[:, None]
    tl.store(out + entry, rounded(entries, out.dtype.element_ty), entry < size)


@_launch.tuned(
    [
        triton.Config({"BLOCKS": 1}, num_warps=4, num_stages=4),
        triton.Config({"BLOCKS": 2}, num_warps=4, num_stages=3),
        triton.Config({"BLOCKS": 4}, num_warps=4, num_stages=3),
        triton.Config({"BLOCKS": 4}, num_warps=8, num_stages=2),
    ],
    key=["outputs", "along", "BLOCK_T"],
    small={"BLOCKS": 2},
)
@triton.jit
def _linear(
    x: tl.tensor,
    codes: tl.tensor,
    absmax: tl.tensor,
    table: tl.tensor,
    levels: tl.tensor,
    absmax2: tl.tensor,
    offset: tl.tensor,
    parts: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    along: tl.tensor,
    x_row: tl.tensor,
    block2: tl.tensor,
    run: tl.tensor,
    SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    part, t = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_T).to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, run, BLOCKS):
        # Blocks are counted along a row of W; `along` of them make one.
        first = part * run + start
        block = first + tl.arange(0, BLOCKS)
        at = o[:, None] * along + block
        scale = _scales(absmax, levels, absmax2, offset, block2, at, (o < outputs)[:, None] & (block < along), NESTED)
        byte = first * (SIZE // 2) + tl.arange(0, BLOCKS * SIZE // 2)
        held = (o < outputs)[:, None] & (byte < along * (SIZE // 2))
        values = _values(tl.load(codes + o[:, None] * along * (SIZE // 2) + byte, held, 0), table)
        weights = tl.reshape(values, (BLOCK_O, BLOCKS, SIZE)) * scale[:, :, None]
        w_tile = rounded(tl.reshape(weights, (BLOCK_O, BLOCKS * SIZE)), x.dtype.element_ty)
        i = first * SIZE + tl.arange(0, BLOCKS * SIZE)
        x_tile = tl.load(x + t[:, None] * x_row + i, (t < rows)[:, None] & (i < along * SIZE), 0.0)
        total = add_dot(total, x_tile, tl.trans(w_tile), PRECISION)
    tl.store(parts + (part * rows + t[:, None]) * outputs + o, total, (t < rows)[:, None] & (o < outputs))
