"""Partial fine-tuning: chosen parts of the base are trained, the rest stays frozen.

    W' = a copy of W that is trained       for the last k blocks, embeddings, roles, names, "re:…" patterns
    W'[rows, columns of head h] = V_h      for single attention heads; every other entry is the base's own bit

With gradual unfreezing (ULMFiT: Howard & Ruder 2018, arXiv:1801.06146) training begins at the last of the chosen
blocks, and the next one below joins after every `unfreeze_every` steps; embeddings come last, what lies outside the
blocks and single heads are trained from the start. A controller counts the steps (`inlay.controllers`); if nobody calls
it, nothing more unfreezes.

Parameters: all of those chosen, each tied one once. One head of width d_h in a model of width d, with biases and with
as many key-value heads as heads: 4 · d_h · d + 3 · d_h.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from inlay.engine.controller import Controller
from inlay.engine.parameters import parameter_sites, with_tied
from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.trained_copy import CopyMethod, copies
from inlay.errors import ConfigError
from inlay.pieces.subsets.head_slices import HeadSlice, head_slices
from inlay.pieces.subsets.unfreezing import EMBEDDINGS, GradualCopy, GradualUnfreezing, below_top, in_turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartialFineTuning(CopyMethod):
    """Train the last blocks, the embeddings, named places or single attention heads; freeze everything else."""

    kind = "freezing"
    paper = "Howard & Ruder 2018, arXiv:1801.06146"
    learning_rate: ClassVar[float] = 5e-5

    top_k: int = 0
    """Train the last k blocks (of the encoder and of the decoder, where there are two stacks)."""
    embeddings: bool = False
    """Train token, position, type and patch embeddings."""
    heads: Mapping[int | str, Sequence[int]] = dataclasses.field(default_factory=dict)
    """Single attention heads: {layer, or a target that names attentions: [indices]}."""
    unfreeze_every: float | None = None
    """Gradual unfreezing: optimiser steps between two blocks (1, 2, …), or the share of the run (below 1)."""

    def __post_init__(self) -> None:
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ConfigError(f"PartialFineTuning(top_k={self.top_k!r}): a whole number of blocks is needed")
        if self.unfreeze_every is not None and self.unfreeze_every <= 0:
            raise ConfigError(f"PartialFineTuning(unfreeze_every={self.unfreeze_every!r}): a positive number is needed")
        if not (self.top_k or self.embeddings or self.heads or self.targets is not None):
            raise ConfigError(
                "PartialFineTuning() chooses nothing to train: give top_k, embeddings=True, targets or heads "
                "(FullFineTuning trains everything)"
            )
        # JSON has no whole numbers as keys.
        heads = {int(key) if str(key).lstrip("-").isdigit() else key: tuple(value) for key, value in self.heads.items()}
        object.__setattr__(self, "heads", heads)

    def sites(self, index: SiteIndex) -> list[Site]:
        whole = self._whole(index)
        names = {site.name for site in whole}
        slices = head_slices(index, self.heads)
        return whole + [site for site in index.parameters() if site.name in slices and site.name not in names]

    def _whole(self, index: SiteIndex) -> list[Site]:
        """The parameters trained as a whole; what is tied to them goes with them."""
        chosen: list[Site] = []
        if self.targets is not None:
            chosen += self._named(index, self.targets)
        if self.embeddings:
            chosen += self._named(index, lambda site: bool(site.roles & EMBEDDINGS))
        if self.top_k:
            chosen += [site for site in self._named(index, "block") if below_top(site) < self.top_k]
        return with_tied(index, chosen)

    def _named(self, index: SiteIndex, targets: Any) -> list[Site]:
        return parameter_sites(index, targets, exclude=self.exclude, layers=self.layers, what=type(self).__name__)

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        index = SiteIndex(model)
        names = {site.name for site in self._whole(index)}
        whole = copies(site for site in sites if site.name in names)
        if self.unfreeze_every is not None:
            whole = in_turns(whole)
        slices = head_slices(index, self.heads)
        return whole + [(site, HeadSlice(site, slices[site.name])) for site in sites if site.name not in names]

    def controller(self, pieces: Mapping[str, Piece]) -> Controller | None:
        gradual = [piece for piece in pieces.values() if isinstance(piece, GradualCopy)]
        return GradualUnfreezing(gradual, self.unfreeze_every) if self.unfreeze_every is not None else None
