"""Methods that run a network beside the model: what docs/methods.md says of them."""

from __future__ import annotations

from typing import Any

from oracles.shadow_by_hand import by_hand

FIELDS: dict[str, dict[str, Any]] = {"shadow": {"r": 2, "update_hidden_size": 3}}
UNTARGETED = ("shadow",)
FORMULAS: dict[str, Any] = {}
# `s` is a BERT of one layer without table of tokens and pooler: attention, feed-forward, norms, positions and types.
SYMBOLS = {"shadow": {"d": 32, "h": 3, "u": 1, "s": 4 * 33 * 32 + 33 * 48 + 49 * 32 + 3 * 64 + 42 * 32}}
ORACLES = {"shadow": ("h + α · U D (h − s) before a block, s + g ⊙ (T(h) − s) after it", by_hand)}
