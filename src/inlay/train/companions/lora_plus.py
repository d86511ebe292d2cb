"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv:2402.12354).

    lr(B) = ratio · lr(A)

With one rate for both, either A moves too far or B hardly moves once the model is wide. Biases, norms and heads keep
the rate they have (HF peft's groups raise that of every vector too).
"""

from __future__ import annotations

import math

from torch import nn
from torch.optim import Optimizer

from inlay.errors import ConfigError, TrainingError


def lora_plus(optimizer: Optimizer, model: nn.Module, ratio: float = 16.0) -> Optimizer:
    """Put every `lora_B` that `optimizer` trains into groups of its own, with `ratio` times the learning rate.

    Everything else of a group (weight decay, betas, …) stays as it was, and so does its place among the groups; call it
    before a schedule is made. Returns the same optimiser. ConfigError where the model has no such B.
    """
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio < math.inf:
        raise ConfigError(f"LoRA+(ratio={ratio!r}): a number above 0 is needed, such as 16")
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise TrainingError("LoRA+ changes the groups of an optimiser that has a schedule: call lora_plus first")
    fast = {id(parameter) for name, parameter in model.named_parameters() if "lora_B" in name.split(".")}
    if not any(id(parameter) in fast for group in optimizer.param_groups for parameter in group["params"]):
        raise ConfigError("LoRA+ trains lora_B faster, and this optimiser trains none: use it with LoRA or a relative")
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in fast]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in fast]
            optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * ratio})
    return optimizer
