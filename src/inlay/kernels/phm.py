"""Parametrised hypercomplex multiplication: x times a sum of n Kronecker products, which is never formed.

    y = x W,     W = Σ_i A_i ⊗ B_i,     A_i (n, n),  B_i (in / n, out / n)

With x as n parts of in / n each, y[b] = Σ_i Σ_a A_i[a, b] x[a] B_i. Where B_i = S_i T_i has rank r, x goes through the
n² r numbers Σ_a A_i[a, b] x[a] S_i: 2 T (in n r + n⁴ r² + n r out) FLOPs for T rows, where W alone has 2 T in out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def factored(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x W for x (…, in), A (n, n, n), S (n, in / n, r), T (n, r, out / n): (…, out)."""
    n, part, r = left.shape
    width = n * r
    narrow = x.reshape(-1, part) @ left.transpose(0, 1).reshape(part, width)
    # (a, i, r) -> (b, i, r): A_i[a, b] between equal i and equal r, and 0 elsewhere.
    mix = torch.diag_embed(rule.permute(1, 2, 0).repeat_interleave(r, dim=-1)).transpose(1, 2)
    mixed = narrow.view(-1, n * width) @ mix.reshape(n * width, n * width)
    return (mixed.view(-1, width) @ right.reshape(width, -1)).view(*x.shape[:-1], n * right.shape[-1])


def full(x: Tensor, rule: Tensor, blocks: Tensor) -> Tensor:
    """x W for x (…, in), A (n, n, n), B (n, in / n, out / n), whose rank is full, so that W is formed: (…, out)."""
    return x @ torch.einsum("iab,ipq->apbq", rule, blocks).reshape(x.shape[-1], -1)
