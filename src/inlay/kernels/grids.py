"""Changes of a weight that are a grid of blocks, applied to activations at the blocks' own cost: no matrix is formed.

Each takes y (…, out), what the base gave for x (…, in), and gives y + x ΔWᵀ in the dtype of y.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels.lora import rows


def exchanged(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """GraLoRA with A (k, in / k, r) and B (k, r, out / k).

    Each of the k parts of x becomes r numbers, in k portions of r / k; each part of y reads one portion of each part
    of x. FLOPs: 2 T r (in + out), as LoRA at the same rank, whose reach is k times smaller.
    """
    portions = swapped(parts(rows(x.to(y.dtype)), len(a)) @ a.to(y.dtype))
    total = torch.baddbmm(parts(rows(y), len(a)), portions, b.to(y.dtype))
    return total.transpose(0, 1).reshape(y.shape).to(y.dtype)


def parts(x: Tensor, k: int) -> Tensor:
    """(T, n) as (k, T, n / k), a view."""
    return x.view(len(x), k, x.shape[1] // k).transpose(0, 1)


def swapped(h: Tensor) -> Tensor:
    """(k, T, r): portion j of part n and portion n of part j change places."""
    k, count, r = h.shape
    return h.view(k, count, k, r // k).permute(2, 1, 0, 3).reshape(h.shape)


def exchanged_delta(a: Tensor, b: Tensor) -> Tensor:
    """The matrix of `exchanged` with scale 1, (out, in)."""
    k, i, r = a.shape
    blocks = torch.einsum("nijs,jnso->joni", a.view(k, i, k, r // k), b.view(k, k, r // k, -1))
    return blocks.reshape(-1, k * i)


def kronecker(y: Tensor, x: Tensor, first: Tensor, narrow: Tensor | None, wide: Tensor | None) -> Tensor:
    """ΔW = W₁ ⊗ W₂ with W₁ (l, m), and W₂ = wide · narrow (k, n) by its factors (k, c) and (c, n), or one of them.

    x as an (m, n) matrix becomes W₁ x W₂ᵀ. W₁ is applied where this is narrowest, and W₂ not multiplied out.
    FLOPs: 2 T (c in + l m c + c out), where the product with ΔW would be 2 T in out.
    """
    l, m = first.shape  # noqa: E741
    z = x.to(y.dtype).reshape(-1, x.shape[-1] // m)
    # Two matrices: how torch multiplies a stack, and so the last bit, depends on what requires gradients.
    z = z if narrow is None else z @ narrow.to(y.dtype).t()
    z = torch.einsum("lm,tmc->tlc", first.to(y.dtype), z.view(-1, m, z.shape[1])).flatten(0, 1)
    out = y.reshape(len(z), y.shape[-1] // l)
    total = out + z if wide is None else torch.addmm(out, z, wide.to(y.dtype).t())
    return total.view(y.shape).to(y.dtype)


def kronecker_delta(first: Tensor, second: Tensor) -> Tensor:
    """W₁ ⊗ W₂ (l k, m n) for W₁ (l, m) and W₂ (k, n)."""
    return (first[:, None, :, None] * second[None, :, None, :]).flatten(2).flatten(0, 1)


def sharded(y: Tensor, x: Tensor, block: Tensor) -> Tensor:
    """MiSS: every r consecutive inputs are read by the same D (r, n), every n consecutive outputs written alike.

    With n = out, a LoRA of rank r whose A only sums. FLOPs: T in + 2 T r n + T out.
    """
    shards, out, n = summed(rows(x.to(y.dtype)), len(block)), rows(y), block.shape[1]
    if n == out.shape[1]:
        return torch.addmm(out, shards, block.to(y.dtype)).view(y.shape).to(y.dtype)
    total = out.view(len(out), out.shape[1] // n, n) + (shards @ block.to(y.dtype))[:, None]
    return total.view(y.shape).to(y.dtype)


def summed(x: Tensor, r: int) -> Tensor:
    """(T, in) summed over its shards of r, the last of which may be shorter: (T, r)."""
    x = F.pad(x, (0, -x.shape[1] % r)) if x.shape[1] % r else x
    return x.view(len(x), x.shape[1] // r, r).sum(1)


def sharded_delta(block: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of `sharded`, (out, in)."""
    (out, inside), (r, n) = shape, block.shape
    return block.t().repeat(out // n, -(-inside // r))[:, :inside]


def block_affine_delta(weight: Tensor, blocks: Tensor) -> Tensor:
    """MiSS "bat": (W_pq + I) D_p for each block of W (out, in) of r × r, with D (out / r, r, r). FLOPs: 2 r in out."""
    p, r, _ = blocks.shape
    product = weight.to(blocks.dtype).reshape(p, -1, r) @ blocks
    return (product.view(p, r, -1, r) + blocks[:, :, None]).view(weight.shape)


def split(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`: `factor` first where it divides, else the largest divisor that is no larger.

    That one is at most the square root; for -1 it is the divisor next to it. As in LyCORIS and HF peft.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    first = max(number for number in range(1, most + 1) if size % number == 0)
    return first, size // first
