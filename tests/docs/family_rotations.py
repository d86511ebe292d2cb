"""Methods that turn the input or the output of a linear: their formulas, from the tensors that they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS: dict[str, dict[str, Any]] = {
    "boft": {"block_size": 2}, "hra": {"r": 2}, "oft": {"block_size": 0, "r": 2}, "psoft": {"r": 2},
    "road": {"group_size": 2},
}  # fmt: skip


def boft(x: Tensor, w: Tensor, b: Tensor, boft_R: Tensor, boft_s: Tensor) -> Tensor:
    blocks = []
    for r in boft_R[0]:  # three blocks of two, one factor
        q = (r - r.T) / 2
        blocks.append((torch.eye(2) - q) @ torch.linalg.inv(torch.eye(2) + q))
    return boft_s.flatten() * F.linear(x @ torch.block_diag(*blocks), w) + b


def hra(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    for u in t["hra_u"].T:
        w = w - 2 * torch.outer(w @ u, u) / (u @ u)
    return F.linear(x, w, b)


def oft(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    blocks = []
    for entries in t["oft_R_weight"]:  # two blocks of three
        q = torch.zeros(3, 3)
        q[0, 1], q[0, 2], q[1, 2] = entries
        q = q - q.T
        blocks.append(torch.eye(3) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    return F.linear(x @ torch.block_diag(*blocks), w, b)


def psoft(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    q = torch.tensor([[0.0, 1], [-1, 0]]) * t["psoft_R_weight"]
    r = (torch.eye(2) + q) @ torch.linalg.inv(torch.eye(2) - q)
    turn = torch.diag(t["psoft_R_vector_b"]) @ r @ torch.diag(t["psoft_R_vector_a"])
    return F.linear(x, w + u[:, :2] * s[:2] @ (turn - torch.eye(2)) @ v[:2], b)


def road(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    z, turned = F.linear(x, w, b), []
    for j, (theta, alpha) in enumerate(zip(t["road_theta"], t["road_alpha"], strict=True)):  # groups of one pair
        turn = alpha * torch.tensor([[theta.cos(), -theta.sin()], [theta.sin(), theta.cos()]])
        turned.append(z[:, 2 * j : 2 * j + 2] @ turn.T)
    return torch.cat(turned, dim=1)


FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "boft": ("y = s ⊙ (W B_1 … B_m x) + b, B_j orthogonal", boft),
    "hra": ("y = W H_1 … H_r x + b, H_i = I − 2 u_i u_iᵀ / ‖u_i‖²", hra),
    "oft": ("y = W R x + b, R block-diagonal, orthogonal", oft),
    "psoft": ("W′ = W + B (diag(b) R diag(a) − I) A, R orthogonal", psoft),
    "road": ("y = R (W x + b), R turning and scaling outputs in pairs", road),
}
