"""Methods whose change has a structure: shares of W, a grid of blocks, shards, a bias: their formulas and fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS: dict[str, dict[str, Any]] = {
    "delora": {"r": 2, "strength": 2.5},
    "gralora": {"r": 2, "alpha": 3},
    "hira": {"r": 2},
    "lokr": {"r": 1, "decompose_factor": 2, "alpha": 3},
    "miss": {"r": 2},
}


def hira(x: Tensor, w: Tensor, b: Tensor, hira_A: Tensor, hira_B: Tensor) -> Tensor:
    return F.linear(x, w * (1 + hira_B @ hira_A), b)


def gralora(x: Tensor, w: Tensor, b: Tensor, gralora_A: Tensor, gralora_B: Tensor) -> Tensor:
    blocks = [[3 / 2 * gralora_B[j, n, :, None] * gralora_A[n, :, j] for n in (0, 1)] for j in (0, 1)]
    return F.linear(x, w + torch.cat([torch.cat(row, 1) for row in blocks]), b)


def delora(
    x: Tensor, w: Tensor, b: Tensor, delora_A: Tensor, delora_B: Tensor, delora_lambda: Tensor
) -> Tensor:
    outer = [delora_B[:, i, None] * delora_A[i] / (delora_B[:, i].norm() * delora_A[i].norm()) for i in (0, 1)]
    return F.linear(x, w + delora_lambda / 2 * (outer[0] + outer[1]) * w.norm(dim=0), b)


def lokr(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    return F.linear(x, w + 3 * torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]), b)


def miss(x: Tensor, w: Tensor, b: Tensor, miss_block: Tensor) -> Tensor:
    return F.linear(x, w + torch.cat([miss_block] * 3).T, b)


def beft(x: Tensor, w: Tensor, b: Tensor, beft_bias: Tensor) -> Tensor:
    return F.linear(x, w, b) + beft_bias


FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "beft": ("y = W x + b + v", beft),
    "delora": ("W′ = W + (λ / r) · Σ_i b_i a_iᵀ / (‖b_i‖ ‖a_i‖) · diag(n)", delora),
    "gralora": ("W′ = W + s · [B_jn A_jn]", gralora),
    "hira": ("W′ = W + W ⊙ (B A)", hira),
    "lokr": ("W′ = W + s · W₁ ⊗ W₂", lokr),
    "miss": ("W′ = W + [D D … D]ᵀ", miss),
}
