"""The density loss: what a gate computes, which is all that the model itself shows of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

FIELDS: dict[str, dict[str, Any]] = {"density": {"adaptive": True}}


def density(x: Tensor, w: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    return gate * F.linear(x, w, b)


FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "density": ("loss + w · mean a² / (a² + ε); with gates y = g · (W a + b)", density)
}
