"""AdaLoRA's part in the training loop: which triplets are worth their place, and how many there are to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inlay.engine.controller import Controller
from inlay.errors import ConfigError, TrainingError
from inlay.pieces.lora.importance import orthogonality_loss, take_in

NAMES = ("lora_A", "lora_B", "lora_E")


class RankBudget(Controller):
    """Scores all triplets after each optimiser step, and leaves the best of them (formulas in `adalora`).

    `method` has the fields that decide how, described in `methods/adalora.py`.
    """

    def __init__(self, method: Any, pieces: Sequence[Any]) -> None:
        self.method = method
        self.pieces = list(pieces)
        self.step = 0
        self.total: int | None = None
        self.sensitivity: dict[str, Tensor] = {}
        """Ī of each parameter."""
        self.uncertainty: dict[str, Tensor] = {}
        """Ū of each parameter."""

    def prepare(self, total_steps: int) -> None:
        self.total = total_steps
        if self.method.tinit + self.method.tfinal >= total_steps:
            raise ConfigError(
                f"AdaLoRA(tinit={self.method.tinit}, tfinal={self.method.tfinal}): of the run's {total_steps} steps "
                "none is left for the budget to shrink in; lower them"
            )

    def extra_loss(self) -> Tensor | None:
        if not self.method.orthogonality or not torch.is_grad_enabled():
            return None
        matrices = [rows for piece in self.pieces for rows in (piece.lora_A, piece.lora_B.t())]
        return self.method.orthogonality * orthogonality_loss(matrices) if matrices else None

    def budget(self, step: int) -> int:
        """How many triplets there are to be after this step."""
        assert self.total is not None
        method, places = self.method, len(self.pieces)
        first: int = method.init_r * places
        last: int = method.target_r * places
        if step <= method.tinit:
            return first
        if step >= self.total - method.tfinal:
            return last
        left = 1 - (step - method.tinit) / (self.total - method.tfinal - method.tinit)
        return int((first - last) * left**3 + last)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        if self.total is None:
            raise TrainingError("AdaLoRA needs the length of the run: call the controller's prepare(total_steps) first")
        self.step += 1
        end = self.total - self.method.tfinal
        if self.step < end or not self.sensitivity:  # the last allocation goes by what was known before it
            self.score()
        if self.step == end or (self.method.tinit < self.step < end and self.step % self.method.delta_t == 0):
            self.allocate(self.budget(self.step))
        elif self.step > end:
            for piece in self.pieces:
                assert piece.kept is not None
                piece.keep(piece.kept)

    def score(self) -> None:
        """Take the sensitivity of this step into the averages."""
        for number, piece in enumerate(self.pieces):
            for name in NAMES:
                parameter, key = getattr(piece, name), f"{number}.{name}"
                if parameter.grad is None:
                    raise TrainingError("AdaLoRA's controller is called after optimizer.step() and before zero_grad()")
                now = (parameter * parameter.grad).abs()
                average = self.sensitivity.setdefault(key, torch.zeros_like(now))
                strays = self.uncertainty.setdefault(key, torch.zeros_like(now))
                take_in(now, average, strays, self.method.beta1, self.method.beta2)

    def allocate(self, budget: int) -> None:
        """Leave the best triplets of the whole model; of those that score alike, the first."""
        scores = [self.triplets(number) for number in range(len(self.pieces))]
        order = torch.cat(scores).sort(descending=True, stable=True).indices
        chosen = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        chosen[order[:budget]] = True
        for piece, own in zip(self.pieces, torch.split(chosen, [len(one) for one in scores]), strict=True):
            piece.keep(own)

    def triplets(self, number: int) -> Tensor:
        """The score of each triplet of a piece."""
        a, b, e = (self.sensitivity[f"{number}.{name}"] * self.uncertainty[f"{number}.{name}"] for name in NAMES)
        return e[:, 0] + a.mean(1) + b.mean(0)

    def state_dict(self) -> dict[str, Any]:
        kept = [piece.kept for piece in self.pieces]
        return {"step": self.step, "sensitivity": self.sensitivity, "uncertainty": self.uncertainty, "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.sensitivity, self.uncertainty = dict(state["sensitivity"]), dict(state["uncertainty"])
        for piece, kept in zip(self.pieces, state["kept"], strict=True):
            piece.keep(kept)
