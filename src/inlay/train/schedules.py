"""Warm-up, stable, decay, constant: the schedule of the peripheral language model (Deng et al. 2025, arXiv:2503.12167).

    lr / η =  t / W                     t < W             warm-up
              1                         t < W + S         stable
              m + (1 − m) f(p)          t < W + S + D     decay, p = (t − W − S) / D
              m                         afterwards        constant

f falls from 1 to 0: linear, cosine, or exponential, which is lr / η = mᵖ. Continuous, and after the warm-up never
rising. Which form and lengths the authors used is not published; the defaults are ours.
"""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from inlay.errors import ConfigError
from inlay.train.optimisation import check_schedule


def warmup_stable_decay_constant(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    *,
    num_stable_steps: float = 0.6,
    num_decay_steps: float = 0.2,
    min_lr_ratio: float = 0.1,
    decay_type: str = "cosine",
) -> LambdaLR:
    """The schedule for `optimizer`. Below 1, `num_stable_steps` and `num_decay_steps` are shares of the run.

    `min_lr_ratio` is m. Raises ConfigError for a value that cannot be used, or where the run is over before the decay.
    """
    given: dict[str, Any] = {"num_stable_steps": num_stable_steps, "num_decay_steps": num_decay_steps}
    check_schedule({**given, "min_lr_ratio": min_lr_ratio, "decay_type": decay_type})
    stable, decay = (math.floor(n * num_training_steps) if 0 < n < 1 else int(n) for n in given.values())
    if num_warmup_steps + stable + decay > num_training_steps:
        raise ConfigError(
            f"lr_scheduler_kwargs: {num_warmup_steps} steps of warm-up, {stable} stable and {decay} of decay are more "
            f"than the run's {num_training_steps}: lower num_stable_steps or num_decay_steps"
        )
    return LambdaLR(optimizer, Factor(num_warmup_steps, stable, decay, min_lr_ratio, decay_type))


class Factor:
    """The share of the learning rate at a step. An object, so that it is saved with the schedule's state."""

    def __init__(self, warmup: int, stable: int, decay: int, least: float, kind: str) -> None:
        self.warmup, self.stable, self.decay, self.least, self.kind = warmup, stable, decay, least, kind

    def __call__(self, step: int) -> float:
        """lr / η after so many steps."""
        past = step - self.warmup - self.stable
        if step < self.warmup:
            return step / self.warmup
        if past < 0:
            return 1.0
        if past >= self.decay:
            return self.least
        share = past / self.decay
        if self.kind == "exponential":
            return float(self.least**share)
        left = 1 - share if self.kind == "linear" else (1 + math.cos(math.pi * share)) / 2
        return self.least + (1 - self.least) * left
