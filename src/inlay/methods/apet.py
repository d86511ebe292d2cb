"""APET: arbitrary few parameters (Su et al. 2023, arXiv:2306.02320): a number of them, anywhere, drawn by chance.

    θ′ = θ + S,     S nonzero at n entries, or in whole tensors of n entries at most, drawn at random

The paper asks whether it matters where the trained parameters are, and draws them from all of the model's: by its
definition single entries, in its code whole tensors, in random order as long as they fit. S starts at zero, so the
model starts as the base.

Parameters: exactly n (element); at most n, and short of it by less than any tensor left out (tensor).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from inlay.engine.sites import Site
from inlay.pieces.subsets.selection import Choice
from inlay.pieces.subsets.sparse import SparseMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class APET(SparseMethod):
    """θ + S with S at n entries drawn from the whole model, or in tensors drawn until n is used up."""

    kind = "apet"
    peft_type = None
    paper = "Su et al. 2023, arXiv:2306.02320"

    budget: float | int = 0.005
    """n: how many entries (a whole number), or their share of all entries of the targets."""
    granularity: str = "element"
    """What is drawn: element, or tensor as in the authors' code."""
    seed: int = 0
    """Of the drawing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choice(())

    def choice(self, sites: Sequence[Site]) -> Choice:
        return Choice(
            budget=self.budget, score="random", granularity=self.granularity, seed=self.seed, what=type(self).__name__
        )
