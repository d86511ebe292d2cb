"""Methods whose change is a product of small matrices: their formulas, from the tensors that they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

FIELDS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 2, "target_r": 1},
    "increlora": {"init_r": 2},
    "loha": {"r": 2},
}


def loha(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    change = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    return F.linear(x, w + 8 / 2 * change, b)


def adalora(x: Tensor, w: Tensor, b: Tensor, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor) -> Tensor:
    return F.linear(x, w + 8 / (2 + 1e-5) * lora_B @ (lora_A * lora_E), b)


def increlora(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    return F.linear(x, w + 32 / 2 * t["lora_B_0"] @ (t["lora_A_0"] * t["lora_E_0"]), b)  # one block of each


FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "adalora": ("W′ = W + s · B (A ⊙ E)", adalora),
    "increlora": ("W′ = W + s · B (A ⊙ E)", increlora),
    "loha": ("W′ = W + s · (A₁ B₁) ⊙ (A₂ B₂)", loha),
}
