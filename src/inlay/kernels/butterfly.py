"""BOFT's butterfly: m factors of block rotations, each pairing half-blocks that lie farther apart.

Factor j (from 0) reads each group of 2^j blocks of b as [2][2^j][b / 2], and turns the b entries together that are at
the same place of the middle index. All factors stay within groups of 2^(m−1) blocks. So where such a group
is small their product is formed once, a group's width of rows through all factors, and x is turned by it in one pass;
where it is large x goes through factor by factor.

FLOPs: 2 T in w forward with groups of width w = b 2^(m−1) up to `WIDEST`, 2 m T in b above. Kept: x and the product, or
x after each factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.kernels.choice import without_autocast
from inlay.kernels.rotations import cayley, rotated
from inlay.kernels.scaling import scaled

WIDEST = 64
"""Up to this width the product of all factors on a group is formed."""


def turned(x: Tensor, r: Tensor, inverse: bool = False) -> Tensor:
    """x (…, in) times B_{m−1} … B_0 of R (m, n, b, b), in the dtype of x; `inverse`: times the transpose."""
    change = cayley((r.mT - r) / 2)  # of −Q: HF peft's sign
    m, n, b, _ = r.shape
    if m == 1:
        return rotated(x, change[0].mT if inverse else change[0])
    group = b * 2 ** (m - 1)
    if group > WIDEST:
        return through(x, change, inverse)
    identity = torch.eye(group, dtype=change.dtype, device=change.device)
    product = through(identity.repeat(1, n * b // group), change, inverse)  # row t: row t of every group's product
    blocks = product.view(group, -1, group).transpose(0, 1)
    return rotated(x, blocks - identity)


def through(x: Tensor, change: Tensor, inverse: bool) -> Tensor:
    """x through the factors one by one: the last first, or the first first and transposed."""
    m, _, b, _ = change.shape
    for j in range(m) if inverse else reversed(range(m)):
        factor = change[j].mT if inverse else change[j]
        paired = x if j == 0 else x.reshape(*x.shape[:-1], -1, 2, 2**j, b // 2).transpose(-3, -2)
        y = rotated(paired.reshape(x.shape), factor)
        x = y if j == 0 else y.view(paired.shape).transpose(-3, -2).reshape(x.shape)
    return x


def stretched(y: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """s ⊙ (y − b) + b for y (…, out), in the dtype of y, and y itself where s is one."""
    with without_autocast(y):
        if bias is None:
            return scaled(y, scale)
        if y.dtype == scale.dtype:
            return torch.addcmul((1 - scale) * bias.to(y.dtype), y, scale)
        return y + scaled(y - bias.to(y.dtype), scale - 1)
