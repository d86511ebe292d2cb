"""Gradual unfreezing: trained copies that join one after another, from the top of a model to its embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inlay.engine.controller import Controller
from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.engine.trained_copy import TrainedCopy
from inlay.errors import TrainingError

EMBEDDINGS = frozenset({"embed", "position", "patch"})


def below_top(site: Site) -> int:
    """0 for places in the last block of their stack, 1 in the one below it, and so on."""
    return 0 if site.layer is None or site.depth is None else site.depth - 1 - site.layer


class GradualCopy(TrainedCopy):
    """A trained copy that receives gradients only once its turn has come."""

    def __init__(self, value: nn.Parameter, dtype: torch.dtype, turn: int) -> None:
        super().__init__(value, dtype)
        self.turn = turn
        self.frozen = turn > 0

    def weight(self, weight: Tensor) -> Tensor:
        return super().weight(weight).detach() if self.frozen else super().weight(weight)


def in_turns(made: Sequence[tuple[Site, Piece]]) -> list[tuple[Site, Piece]]:
    """The same copies with their turns: blocks from the top, then embeddings; tied places wait for the last of them."""
    last = 1 + max((below_top(site) for site, _ in made), default=0)
    depths: dict[int, int] = {}
    for site, piece in made:
        assert isinstance(piece, TrainedCopy)
        depth = last if site.layer is None and site.roles & EMBEDDINGS else below_top(site)
        depths[id(piece.value)] = max(depth, depths.get(id(piece.value), 0))
    present = {below_top(site) for site, _ in made if site.layer is not None} | ({last} & set(depths.values()))
    return [
        (site, GradualCopy(piece.value, piece.dtype, sum(d < depths[id(piece.value)] for d in present)))
        for site, piece in made
        if isinstance(piece, TrainedCopy)
    ]


class GradualUnfreezing(Controller):
    """Lets the copies of the next turn join after every so many optimiser steps."""

    def __init__(self, pieces: Sequence[GradualCopy], every: float) -> None:
        self.pieces = list(pieces)
        self.every = every
        self.period = int(every) if every >= 1 else 0
        self.step = 0

    def prepare(self, total_steps: int) -> None:
        if self.every < 1:
            self.period = max(1, round(self.every * total_steps))

    def after_step(self, optimizer: Optimizer) -> None:
        if not self.period:
            raise TrainingError(
                f"PartialFineTuning(unfreeze_every={self.every}) is a share of the run, whose length is not known: "
                "call the controller's prepare(total_steps) first, or give a number of steps"
            )
        self.step += 1
        self._refresh()

    def _refresh(self) -> None:
        for piece in self.pieces:
            piece.frozen = piece.turn > self.step // max(1, self.period)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "period": self.period}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.period = int(state["step"]), int(state["period"])
        self._refresh()
