"""Methods that train chosen entries: with a budget of everything, which the table counts, θ + S is a whole change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

FIELDS: dict[str, dict[str, Any]] = {
    "apet": {"budget": 1.0},
    "sparse": {"budget": 1.0, "score": "magnitude"},
}


def changed(x: Tensor, w: Tensor, b: Tensor, shira_weight: Tensor, entries_values: Tensor) -> Tensor:
    return F.linear(x, w + shira_weight.view(10, 6), b + entries_values)


FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "apet": ("θ′ = θ + S, S at n entries drawn at random", changed),
    "sparse": ("θ′ = θ + S, S at the k entries of largest score", changed),
}
