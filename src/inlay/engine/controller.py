"""What a method does in the training loop, for the few that need to: schedules, masks, extra losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Controller:
    """Called by the trainer (or by a plain loop) around each optimiser step; saved and restored with the run.

    In a plain loop: add each controller's `extra_loss()` to the loss; after `backward()` call `before_step(optimizer)`,
    then `optimizer.step()`, `after_step(optimizer)` and `optimizer.zero_grad()`.
    """

    def prepare(self, total_steps: int) -> None:
        """Told once, before the first step, how many optimiser steps the run will take."""

    def extra_loss(self) -> Tensor | None:
        """A term to add to the task's loss, or None."""
        return None

    def before_step(self, optimizer: Optimizer) -> None:
        """Gradients are complete and unscaled; the optimiser has not stepped."""

    def after_step(self, optimizer: Optimizer) -> None:
        """The optimiser has stepped; gradients are still there."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to be the same run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s result."""
