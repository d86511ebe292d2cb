"""Methods that mix several low-rank adapters: their formulas, from the tensors that they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

FIELDS: dict[str, dict[str, Any]] = {
    "lily": {"r": 2, "num_B": 3, "scale": 0.5},
    "poly": {"r": 2, "n_skills": 3},
}
SYMBOLS: dict[str, dict[str, int]] = {"lily": {"n": 3}, "poly": {"s": 3, "q": 1, "T": 1}}


def lily(x: Tensor, w: Tensor, b: Tensor, lily_router: Tensor, **t: Tensor) -> Tensor:
    h = x @ t["shared_lily_A_0"].T
    each = (h @ lily_router.T).softmax(-1).flatten(0, -2).mean(0)
    changes = [h @ expert for expert in t["shared_lily_B_0"].chunk(3)]
    return F.linear(x, w, b) + 0.5 * sum(p * change for p, change in zip(each, changes, strict=True))


def poly(
    x: Tensor, w: Tensor, b: Tensor, poly_lora_A: Tensor, poly_lora_B: Tensor, module_logits: Tensor
) -> Tensor:
    gates = module_logits[0].sigmoid()
    mix = [
        sum(gate * skill for gate, skill in zip(gates, skills[0], strict=True)) / gates.sum()
        for skills in (poly_lora_A, poly_lora_B)
    ]
    return F.linear(x, w, b) + x @ mix[0] @ mix[1] / 2


FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "lily": ("y = W x + s · (Σ_e p_e B_e)ᵀ A x, p = mean softmax(R A x)", lily),
    "poly": ("y = W x + 1/r · B_tᵀ A_tᵀ x, A_t = Σ_s w_ts A_s, B_t = Σ_s w_ts B_s", poly),
}
