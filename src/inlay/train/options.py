"""Inlay's own settings of the `train:` section: what each may be, checked before torch is imported."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from inlay.errors import ConfigError, did_you_mean

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
PLACES = ("auto", "off", "memory", "disk")
"""What `cache_frozen` may be."""
DTYPES = ("exact", "bfloat16")
"""What `cache_frozen_dtype` may be."""
BUDGETS = {"memory": 2 * 10**9, "disk": 20 * 10**9}
"""Bytes that cached states may take when `cache_frozen_budget` is left out."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Inlay's own training settings, with their defaults."""

    cache_frozen: str = "auto"
    """Keep the hidden states that enter the first trained block: auto (in memory, if it applies), memory, disk, off."""
    cache_frozen_budget: int | None = None
    """Bytes that these may take; None: 2 GB in memory, 20 GB on disk."""
    cache_frozen_dtype: str = "exact"
    """How they are kept: exact (as computed) or bfloat16 (half of fp32, rounded to 3 digits)."""
    frozen_dropout: bool = True
    """Whether the blocks below the first trained one drop out in training, as transformers' Trainer has it."""
    activation_budget: int | None = None
    """Bytes that one step may keep for its backward pass; blocks are recomputed, or offloaded, until it fits."""
    chunked_loss: bool = False
    """Compute a causal language model's loss chunk by chunk, so that the logits of a whole batch never exist."""

    @classmethod
    def of(cls, train: Mapping[str, Any]) -> Options:
        """Read from a run's `train` settings. Raises ConfigError for a value that cannot be used."""
        names = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in train.items() if name in names and value is not None}
        for name, allowed in (("cache_frozen", PLACES), ("cache_frozen_dtype", DTYPES)):
            if given.get(name, allowed[0]) not in allowed:
                raise ConfigError(
                    f"train.{name} must be one of {', '.join(allowed)}; got {given[name]!r}"
                    f"{did_you_mean(str(given[name]), allowed)}"
                )
        for name in ("cache_frozen_budget", "activation_budget"):
            if name in given:
                given[name] = byte_count(given[name], f"train.{name}")
        return cls(**given)


def byte_count(value: Any, key: str) -> int:
    """Bytes from a number, or from text such as "2GB" (10⁹ each), "512 MiB" (2²⁰ each). ConfigError for others."""
    text = str(value).strip().lower().removesuffix("b")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)", text)
    if isinstance(value, bool) or match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise ConfigError(f'{key} is a number of bytes, such as "2GB" or "512MiB"; got {value!r}')
    return int(float(match[1]) * UNITS[match[2]])


def readable(count: int) -> str:
    """`812 B`, `12.3 MB`, `2.0 GB`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
