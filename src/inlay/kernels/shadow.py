"""What a shadow does at a block: it corrects what goes in, and moves by what comes out.

    h′ = h + α · U D (h − s)                    D (r, d), U (d, r)
    s′ = s + g ⊙ (T(x) − s),  g = σ(G(x))       T and G of one hidden layer: W₂ gelu(W₁ x + b₁) + b₂

Both compute in the dtype of what they are given. T and G read the same x: their first layers are one product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layers(NamedTuple):
    """The four tensors of a network of one hidden layer."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def corrected(h: Tensor, s: Tensor, down: Tensor, up: Tensor, alpha: float, rate: float = 0.0) -> Tensor:
    """h + α · U D dropout(h − s); with U = 0 the very values of h."""
    difference = h - s.to(h.dtype)
    if rate:
        difference = F.dropout(difference, rate)
    change = F.linear(F.linear(difference, down.to(h.dtype)), up.to(h.dtype))
    return torch.add(h, change.to(h.dtype), alpha=alpha)


def moved(s: Tensor, x: Tensor, candidate: Layers, gate: Layers) -> Tensor:
    """(1 − g) ⊙ s + g ⊙ T(x), in the dtype of s."""
    w1, b1 = (torch.cat(pair).to(x.dtype) for pair in ((candidate.w1, gate.w1), (candidate.b1, gate.b1)))
    hidden = torch.split(F.gelu(F.linear(x, w1, b1)), len(candidate.b1), dim=-1)
    t, g = (
        F.linear(one, layers.w2.to(x.dtype), layers.b2.to(x.dtype))
        for one, layers in zip(hidden, (candidate, gate), strict=True)
    )
    return torch.lerp(s, t.to(s.dtype), torch.sigmoid(g).to(s.dtype))
