"""How several changes of one weight become one: pure functions of the changes ΔW_i (each of one shape) and weights w_i.

    linear            Σ w_i ΔW_i                                                  (task arithmetic: Ilharco et al. 2022)
    magnitude_prune   Σ w_i top(ΔW_i), the largest `density` of each kept
    ties              mean over those that agree with the elected sign of w_i top(ΔW_i)        (Yadav et al. 2023)
    dare_linear       Σ w_i drop(ΔW_i) / density, each entry kept with probability `density`   (Yu et al. 2023)
    dare_ties         ties over what drop keeps

The sign of an entry is elected by the sum of the weighted changes ("total") or by their number ("frequency"), so that a
negative weight votes against. Papers: arXiv:2212.04089, 2306.01708, 2311.03099.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rule = Callable[[Sequence[Tensor], Sequence[float]], Tensor]

RULES = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
SIGNS = ("total", "frequency")


def rule(how: str, density: float, sign: str, generator: torch.Generator) -> Rule:
    """The function of this name."""

    def keep(change: Tensor) -> Tensor:
        return drop(change, density, generator) if how.startswith("dare") else top(change, density)

    def combined(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        if how != "linear" and density < 1:
            changes = [keep(change) for change in changes]
        weighted = torch.stack([weight * change for weight, change in zip(weights, changes, strict=True)])
        return agreed(weighted, sign) if how.endswith("ties") else weighted.sum(0)

    return combined


def top(change: Tensor, density: float) -> Tensor:
    """The largest `density` of the entries, the others zero."""
    kept = int(density * change.numel())
    chosen = change.abs().flatten().topk(kept).indices
    result = torch.zeros_like(change).flatten()
    result[chosen] = change.flatten()[chosen]
    return result.view(change.shape)


def drop(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with probability `density` and divided by it, so that the mean stays."""
    kept = torch.rand(change.shape, generator=generator) < density
    return change * kept.to(change.device) / density


def agreed(changes: Tensor, sign: str) -> Tensor:
    """For changes (n, …), the mean at each entry of those that have the sign elected there."""
    votes = changes if sign == "total" else changes.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agree = changes.sign() == elected
    return (changes * agree).sum(0) / agree.sum(0).clamp(min=1)
