"""What the kernels do with blocks: products in float32, and rounding."""

from __future__ import annotations

import triton
import triton.language as tl

from inlay.kernels.triton import _launch

INTERPRETED: tl.constexpr = tl.constexpr(_launch.INTERPRETED)
"""The interpreter multiplies the bit patterns of bfloat16, and truncates where a device rounds."""


@triton.jit
def add_dot(total: tl.tensor, left: tl.tensor, right: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """total + left · right in float32, for blocks of one dtype."""
    if INTERPRETED:  # products of 16-bit numbers are exact in float32
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def rounded(block: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The block in this dtype, rounded to the nearest, at a middle to the even."""
    if INTERPRETED and block.dtype == tl.float32 and tl.bfloat16 == DTYPE:
        bits = block.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return block.to(DTYPE)
