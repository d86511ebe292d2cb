"""The run's own settings for optimiser and schedule: what each may be, checked before torch is imported."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from inlay.errors import ConfigError, did_you_mean

SCHEDULE = "warmup_stable_decay_constant"
"""The one `lr_scheduler_type` that transformers has not."""
DECAYS = ("cosine", "linear", "exponential")


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """What is done to transformers' optimiser, or in its place."""

    lora_plus_ratio: float | None = None
    """LoRA+: how many times A's learning rate B has."""
    riemannian_damping: float | None = None
    """Riemannian preconditioning of LoRA's gradients, with this δ."""
    galore_rank: int | None = None
    """GaLore in place of AdamW: the rank that matrices' gradients are projected to."""
    galore_update_every: int = 200
    """Optimiser steps between two projections."""
    galore_scale: float = 0.25
    """What the projected directions are multiplied by."""
    schedule: Mapping[str, Any] | None = None
    """`lr_scheduler_kwargs` of `warmup_stable_decay_constant`, where that is the schedule."""

    @classmethod
    def of(cls, train: Mapping[str, Any]) -> Optimisation:
        """Read from a run's `train` settings. Raises ConfigError for a value that cannot be used."""
        names = {field.name for field in dataclasses.fields(cls)} - {"schedule"}
        given = {name: value for name, value in train.items() if name in names and value is not None}
        for name, value in given.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"train.{name} must be a number above 0; got {value!r}")
        if "galore_rank" not in given and given.keys() & {"galore_update_every", "galore_scale"}:
            raise ConfigError("train.galore_update_every and galore_scale are GaLore's: give train.galore_rank too")
        beside = [name for name in ("optim", "lora_plus_ratio", "riemannian_damping") if train.get(name) is not None]
        if "galore_rank" in given and beside:
            raise ConfigError(f"train.galore_rank is an AdamW of its own, for full fine-tuning: leave {beside[0]} out")
        if train.get("lr_scheduler_type") != SCHEDULE:
            return cls(**given)
        options = train.get("lr_scheduler_kwargs") or {}
        if not isinstance(options, Mapping):
            raise ConfigError(f"train.lr_scheduler_kwargs must be a mapping of names to values; got {options!r}")
        check_schedule(options)
        return cls(**given, schedule=dict(options))


PLAIN = Optimisation()
"""Nothing of the kind."""


def check_schedule(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option of the schedule that is not known or cannot be used."""
    known = ("num_stable_steps", "num_decay_steps", "min_lr_ratio", "decay_type")
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"lr_scheduler_kwargs has no {name!r} for {SCHEDULE}{did_you_mean(name, known)}")
        if name == "decay_type":
            if value not in DECAYS:
                near = did_you_mean(str(value), DECAYS)
                raise ConfigError(f"lr_scheduler_kwargs.decay_type is one of {', '.join(DECAYS)}; got {value!r}{near}")
            continue
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
        if name == "min_lr_ratio" and not (good and value <= 1):
            raise ConfigError(f"lr_scheduler_kwargs.min_lr_ratio is a share from 0 to 1; got {value!r}")
        if not good or (name != "min_lr_ratio" and value >= 1 and value != int(value)):
            raise ConfigError(f"lr_scheduler_kwargs.{name} is a number of steps, or a share of them; got {value!r}")
    if options.get("decay_type") == "exponential" and options.get("min_lr_ratio", 0.1) == 0:
        raise ConfigError("lr_scheduler_kwargs.min_lr_ratio has to be above 0 for an exponential decay")


def for_transformers(train: Mapping[str, Any]) -> dict[str, Any]:
    """These settings with a schedule that transformers knows; its own are made by the trainer."""
    if train.get("lr_scheduler_type") != SCHEDULE:
        return dict(train)
    return {**{k: v for k, v in train.items() if k != "lr_scheduler_kwargs"}, "lr_scheduler_type": "constant"}


def check_optim(optim: Any) -> None:
    """Raise ConfigError for one of bitsandbytes' optimisers where that is not installed."""
    name = str(optim)
    theirs = name.startswith(("paged_", "lion_", "ademamix", "rmsprop_bnb")) or name in ("adamw_bnb_8bit", "adamw_8bit")
    if theirs and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"train.optim={name} needs bitsandbytes: pip install 'inlay[quant]', or choose adamw_torch")
