"""The companions that a run's settings ask for, applied to the optimiser that transformers has made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from inlay.train.companions.galore import galore
from inlay.train.companions.lora_plus import lora_plus
from inlay.train.companions.riemannian import riemannian
from inlay.train.optimisation import Optimisation
from inlay.train.options import readable


def optimised(
    made: Optimizer, model: nn.Module, args: Any, optimisation: Optimisation, say: Callable[[str], None]
) -> Optimizer:
    """`made` with what the settings do to it, or GaLore in its place; `args` are transformers' TrainingArguments."""
    if optimisation.galore_rank is not None:
        own = galore(
            model,
            lr=args.learning_rate,
            rank=optimisation.galore_rank,
            update_every=optimisation.galore_update_every,
            scale=optimisation.galore_scale,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        ours, theirs = own.state_bytes()
        count = sum(len(group["params"]) for group in own.param_groups if group["rank"] is not None)
        say(
            f"galore_rank {optimisation.galore_rank}: {count} matrices projected; the optimiser's state takes "
            f"{readable(ours)}, AdamW's would take {readable(theirs)}"
        )
        return own
    if optimisation.lora_plus_ratio is not None:
        lora_plus(made, model, optimisation.lora_plus_ratio)
    if optimisation.riemannian_damping is not None:
        riemannian(made, model, optimisation.riemannian_damping)
    return made
