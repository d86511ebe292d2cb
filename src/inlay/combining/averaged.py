"""Average in one model: x through each branch, the outputs by their weights."""

from __future__ import annotations

from typing import Any

import torch

from inlay.combining.bound import BoundBranches, banked
from inlay.combining.inner import Known, Once
from inlay.engine.composition import names_in
from inlay.engine.host import Inlays, Inner
from inlay.engine.piece import Piece
from inlay.pieces.bottlenecks.bottleneck import first_of


class BoundAverage(BoundBranches):
    """h + Σ w_i (branch_i − h)."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the branches."""
        given: tuple[float, ...] | None = self.of.weights  # type: ignore[attr-defined]
        return (1 / len(self.branches),) * len(self.branches) if given is None else given

    def compute(self, inner: Inner, reads: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The weighted outputs of the branches."""
        whole = Once(lambda: inner(*args, **kwargs))
        rest = inner if reads else Known(inner, args, whole)
        outputs = [self.through(branch, rest, reads, args, kwargs) for branch in self.branches]
        weights, left = list(self.weights), 1 - sum(self.weights)
        if abs(left) > 1e-9:
            outputs.append(whole())
            weights.append(left)
        firsts = [output[0] if isinstance(output, tuple) else output for output in outputs]
        total = weights[0] * firsts[0]
        for weight, output in zip(weights[1:], firsts[1:], strict=True):
            total = torch.add(total, output, alpha=weight)
        return first_of(outputs[0], lambda _: total)

    def piece(self, inlays: Inlays, parameter: str | None) -> Piece | None:
        """All branches as one piece, with their weights as gates, where that exists."""
        pairs = zip(self.branches, self.weights, strict=True)
        weights = {names_in(branch)[0]: weight for branch, weight in pairs if branch}
        found = banked(self, inlays, parameter, lambda bank: bank.weigh(weights))
        return found or super().piece(inlays, parameter)
