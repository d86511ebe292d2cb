"""out = s · Σ_p parts[p]: the sums that the blocks of another kernel left, added in a fixed order.

Equal to `parts.sum(0).mul(scale).to(dtype)`. Bytes: one read of the parts, 4 P n, and one write of n; unfused, n is
written and read twice more. Parts just written are mostly still in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.kernels.triton import _launch
from inlay.kernels.triton.blocks import rounded

BLOCK = 1024 if not _launch.INTERPRETED else 64


def reference(parts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The same in plain torch."""
    return parts.sum(0).mul(scale).to(dtype)


def sum_parts(parts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · Σ_p parts[p] for contiguous float32 parts (P, …): (…) in this dtype."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    if out.numel():
        with _launch.on_device(out):
            _sum_parts[(triton.cdiv(out.numel(), BLOCK),)](
                parts, out, scale, parts.shape[0], out.numel(), BLOCK=BLOCK, num_warps=4
            )
    return out


@triton.jit(do_not_specialize=["count"])
def _sum_parts(
    parts: tl.tensor, out: tl.tensor, scale: tl.tensor, count: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr
) -> None:
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts + part * size.to(tl.int64) + i, i < size, 0.0)
    tl.store(out + i, rounded(scale * total, out.dtype.element_ty), i < size)
