"""Σ_n w_n s_n B_n A_n x for weights w of each token: several thin products side by side, as two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Factors = tuple[Tensor, Tensor, float]
"""A (r, in), B (out, r) and s."""


def token_mixture(x: Tensor, weights: Tensor, found: Sequence[Factors], rates: Sequence[float]) -> Tensor:
    """The mixture for x (…, in) and weights (…, N); `rates`: dropout of what goes into each A."""
    factors = [(a.to(x.dtype), b.to(x.dtype)) for a, b, _ in found]
    if any(rates):
        parts = [F.linear(F.dropout(x, rate), a) for (a, _), rate in zip(factors, rates, strict=True)]
        reduced = torch.cat(parts, -1)
    else:
        reduced = F.linear(x, torch.cat([a for a, _ in factors]))
    ranks = [a.shape[0] for a, _ in factors]
    scaled = weights.to(x.dtype) * weights.new_tensor([scale for _, _, scale in found], dtype=x.dtype)
    if len(set(ranks)) == 1:
        mixed = (reduced.view(*reduced.shape[:-1], len(ranks), ranks[0]) * scaled[..., None]).flatten(-2)
    else:
        mixed = reduced * scaled.repeat_interleave(torch.tensor(ranks, device=x.device), -1)
    return F.linear(mixed, torch.cat([b for _, b in factors], dim=1))
