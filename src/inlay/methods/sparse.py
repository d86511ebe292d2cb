"""Sparse fine-tuning: the entries that matter most are trained, whatever and wherever they are.

    θ′ = θ + S,     S nonzero at the k entries of largest score

    score="fisher"      FISH mask (Sung et al. 2021, arXiv:2111.09839): mean of (∂ log p(y | x) / ∂θ)² over examples
    score="magnitude", "gradient", "snip", "random" with r        SHiRA's other masks (arXiv:2406.13175)
    score="lottery"     LT-SFT (Ansell et al. 2021, arXiv:2110.07560): train all, keep what moved most, start again
    score="l0"          diff pruning (Guo et al. 2020, arXiv:2012.07463): train all behind gates that cost, go on from
                        what is left open

S starts at zero (with "l0" at what was found), so the model starts as the base. `inlay train` shows the method its
first batches before it is attached; without it, `inlay.select` does.

Parameters: budget · (all entries of the targets), exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError
from inlay.pieces.subsets.selection import Choice
from inlay.pieces.subsets.sparse import SparseMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseDelta(SparseMethod):
    """θ + S with S at the entries of largest score: FISH masks, LT-SFT, diff pruning, SHiRA's masks."""

    kind = "sparse"
    paper = "Sung et al. 2021, arXiv:2111.09839"

    budget: float | int | None = 0.005
    """How many entries: a whole number, or their share of all entries of the targets."""
    score: str = "fisher"
    """What an entry is chosen by: random, magnitude, gradient, snip, fisher, lottery, l0."""
    granularity: str = "element"
    """What is chosen: element, row, column, head, tensor."""
    scope: str = "global"
    """Whether the best of the whole are chosen (global), or of each tensor in proportion to its size (tensor)."""
    threshold: float | None = None
    """Instead of a budget: whatever scores at least so much."""
    r: int | None = None
    """Instead of a budget: r (in + out) entries of each linear's weight, as many as SHiRA has."""
    batches: int = 64
    """Batches of the training rows that the score is computed on."""
    seed: int = 0
    """Of the score "random" and of searches."""
    search_steps: int = 300
    """Optimiser steps in which lottery and l0 train everything."""
    search_learning_rate: float = 3e-5
    """Their learning rate, which falls to 0."""
    l0_penalty: float = 1.25e-7
    """What l0 charges for each entry that is probably not zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and (self.threshold is not None or not isinstance(self.r, int) or self.r < 1):
            raise ConfigError(f"SparseDelta(r={self.r!r}): a whole number from 1 is needed, and no threshold beside it")
        self.choice(())

    def choice(self, sites: Sequence[Site]) -> Choice:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Choice) if field.name != "what"}
        if self.threshold is not None:
            given["budget"] = None
        if self.r is not None:
            given["budget"] = {site.name: self.r * sum(site.weight.shape) for site in sites}
        return Choice(**given, what="SparseDelta")

    def _candidates(self, index: SiteIndex) -> list[Site]:
        found = super()._candidates(index)
        if self.r is None:
            return found
        linears = {f"{site.path}.weight" for site in index.sites if site.kind == "linear"}
        return [site for site in found if site.name in linears]
