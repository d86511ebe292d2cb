"""Reversible stacks: what docs/methods.md says of them."""

from __future__ import annotations

from typing import Any

from oracles.meft_by_hand import by_hand

FIELDS: dict[str, dict[str, Any]] = {"meft": {"bottleneck": 3}}
UNTARGETED = ("meft",)
FORMULAS: dict[str, Any] = {}
ORACLES = {"meft": ("y₁ = λ x₁ + F(x₂), y₂ = β x₂ + G(y₁), inverted in the backward pass", by_hand)}
