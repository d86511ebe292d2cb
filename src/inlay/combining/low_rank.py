"""A change of one weight as two factors or as a matrix, and the way from either to factors of a chosen rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Change:
    """ΔW (out, in) = B A where it has factors A (r, in) and B (out, r), otherwise `matrix`."""

    a: Tensor | None = None
    b: Tensor | None = None
    matrix: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """Of the factors; None where there are none."""
        return None if self.a is None else self.a.shape[0]

    def dense(self) -> Tensor:
        """ΔW."""
        if self.a is not None and self.b is not None:
            return self.b @ self.a
        assert self.matrix is not None
        return self.matrix

    def scaled(self, weight: float) -> Change:
        """weight · ΔW."""
        if self.b is not None:
            return dataclasses.replace(self, b=weight * self.b)
        assert self.matrix is not None
        return Change(matrix=weight * self.matrix)


def added(changes: Sequence[Change]) -> Change:
    """The sum: exact, and of the ranks' sum, where all have factors."""
    if all(change.rank is not None for change in changes):
        a = torch.cat([change.a for change in changes if change.a is not None])
        b = torch.cat([change.b for change in changes if change.b is not None], 1)
        return Change(a, b)
    return Change(matrix=torch.stack([change.dense() for change in changes]).sum(0))


def factored(change: Change, rank: int | float | None) -> tuple[Tensor, Tensor]:
    """The nearest A (r, in) and B (out, r): r is `rank`, or the least that keeps this share of ‖ΔW‖² (below 1).

    None keeps the factors that there are. Where ΔW has factors, only matrices of their rank are decomposed.
    """
    if (
        change.a is not None
        and change.b is not None
        and (rank is None or (isinstance(rank, int) and rank >= change.a.shape[0]))
    ):
        return change.a, change.b
    u, s, vh = _decomposed(change)
    r = kept(s, rank)
    root = s[:r].sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def main_direction(change: Change) -> Tensor:
    """The unit vector (in) that ΔW stretches most, of either sign; zeros where ΔW is zero."""
    _, s, vh = _decomposed(change)
    return vh[0] * (s[0] > 0)


def _decomposed(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    """U, the singular values and Vᵀ; from factors, without ΔW itself."""
    if change.a is None or change.b is None:
        u, s, vh = torch.linalg.svd(change.dense(), full_matrices=False)
        return u, s, vh
    left, upper = torch.linalg.qr(change.b)
    right, lower = torch.linalg.qr(change.a.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ u, s, vh @ right.T


def kept(singular_values: Tensor, rank: int | float | None) -> int:
    """How many of them: that number, or as many as hold that share of the sum of their squares; at least one."""
    if isinstance(rank, int):
        return min(rank, len(singular_values))
    share = 1.0 if rank is None else rank
    energy = singular_values.double().square().cumsum(0)
    return min(int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1, len(singular_values))
