"""Which step of a training to keep: the one at which the development rows are answered best.

`fit` and `Problem.trained` tell a `BestStep` of every step. A few times, evenly over the training, it measures, and
remembers what is trained where it is the best so far; after the last step it puts the best back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from inlay.fewshot.searches.ranking import Quality


class BestStep:
    """For `each_step`: looks `checks` times, the last step among them. Of equals the earlier is kept.

    `model` gives the model in training, `measure` says how good it is.
    """

    def __init__(self, model: Callable[[], nn.Module], measure: Callable[[], Quality], steps: int, checks: int) -> None:
        self.model, self.measure, self.steps = model, measure, steps
        self.at = {round(steps * (number + 1) / checks) for number in range(checks)} | {steps}
        self.best: Quality | None = None
        """The best so far."""
        self.step = 0
        """Where that was."""
        self._kept: dict[str, Tensor] = {}

    def __call__(self, step: int, loss: float) -> None:
        """Told of a step, from 1."""
        if step not in self.at:
            return
        found = self.measure()
        trained = {name: p for name, p in self.model().named_parameters() if p.requires_grad}
        if self.best is None or found > self.best:
            self.best, self.step = found, step
            self._kept = {name: parameter.detach().clone() for name, parameter in trained.items()}
        elif step == self.steps:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(self._kept[name])
