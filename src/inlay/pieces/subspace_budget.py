"""AdaMSS's part in the training loop: which clusters of rows go on learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inlay.engine.controller import Controller
from inlay.pieces.clustered import AdaMSSPiece


class Schedule(NamedTuple):
    """When how many clusters are left."""

    target: int
    """How many at the end."""
    first: int
    """The step at which their number begins to fall, …"""
    last: int
    """… and at which it has fallen."""
    every: int
    """Steps between two choices."""
    sensitivity: float
    """How much of that average is kept at each step."""
    uncertainty: float
    exponent: float


class SubspaceBudget(Controller):
    """Scores the clusters of the whole model, and closes those that score least: the optimiser passes them over.

    The score of a cluster is the mean of sensitivity times uncertainty over A, plus that over B, averaged since the
    last choice. What is closed stays closed, and keeps what it has learnt.
    """

    def __init__(self, schedule: Schedule, pieces: Mapping[str, AdaMSSPiece]) -> None:
        self.schedule, self.pieces = schedule, dict(pieces)
        self.step = 0
        self.closed: set[str] = set()
        self.averages: dict[str, Tensor] = {}
        """Of each parameter the average sensitivity (key "s …") and uncertainty ("u …")."""

    def clusters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """A and B of every cluster."""
        return {
            f"{name} {k}": pair
            for name, piece in self.pieces.items()
            for k, pair in enumerate(zip(piece.adamss_A, piece.adamss_B, strict=True))
        }

    def before_step(self, optimizer: Optimizer) -> None:
        for key, pair in self.clusters().items():
            if key in self.closed:
                for parameter in pair:
                    parameter.grad = None  # neither decay nor what is left of the momentum moves it then

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        schedule = self.schedule
        if not schedule.first <= self.step <= schedule.last:
            return
        open_ones = {key: pair for key, pair in self.clusters().items() if key not in self.closed}
        for key, pair in open_ones.items():
            for letter, parameter in zip("AB", pair, strict=True):
                self._score(f"{key} {letter}", parameter)
        if self.step % schedule.every == 0 or self.step == schedule.last:
            scores = {key: self._worth(key) for key in open_ones}
            best = sorted(scores, key=lambda key: -scores[key])
            self.closed |= set(best[self.budget(self.step) :])
            self.averages = {}

    def budget(self, step: int) -> int:
        """How many clusters are to be open after this step."""
        schedule, total = self.schedule, len(self.clusters())
        least = min(schedule.target, total)
        left = 1 - (step - schedule.first) / (schedule.last - schedule.first)
        return int(least + (total - least) * max(0.0, left) ** schedule.exponent)

    def _score(self, key: str, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            return
        now = (parameter * parameter.grad).abs()
        sensitivity = self.averages.setdefault(f"s {key}", torch.zeros_like(now))
        uncertainty = self.averages.setdefault(f"u {key}", torch.zeros_like(now))
        uncertainty.lerp_((now - sensitivity).abs(), 1 - self.schedule.uncertainty)
        sensitivity.lerp_(now, 1 - self.schedule.sensitivity)

    def _worth(self, key: str) -> float:
        pairs = [(self.averages.get(f"s {key} {n}"), self.averages.get(f"u {key} {n}")) for n in "AB"]
        return sum(float((s * u).mean()) for s, u in pairs if s is not None and u is not None)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "closed": sorted(self.closed), "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.closed = int(state["step"]), set(state["closed"])
        self.averages = dict(state["averages"])
