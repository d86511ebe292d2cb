"""Methods that change W within subspaces of its own: their formulas, from the tensors that they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

FIELDS: dict[str, dict[str, Any]] = {
    "adamss": {"r": 2, "num_subspaces": 3},
    "deft": {"r": 2},
    "frod": {"sparse_rate": 0.1},
}


def deft(x: Tensor, w: Tensor, b: Tensor, deft_P: Tensor, deft_R: Tensor) -> Tensor:
    return F.linear(x, w - deft_P @ deft_P.relu().T @ w + deft_P @ deft_R, b)


def frod(x: Tensor, w: Tensor, b: Tensor, frod_lambda_l: Tensor, frod_lambda_s_values: Tensor) -> Tensor:
    v = torch.linalg.qr(w)[1].T
    q = torch.linalg.qr(w)[0]
    v = v @ torch.linalg.eigh(torch.linalg.inv(q.T @ q + 1e-3 * torch.eye(6)))[1]  # one weight of its kind
    sides = w @ torch.linalg.inv(v).T
    u = sides / sides.norm(dim=0)
    chosen = torch.randperm(30, generator=torch.Generator().manual_seed(0))[: len(frod_lambda_s_values)]
    core = torch.diag(frod_lambda_l)
    for value, place in zip(frod_lambda_s_values, chosen.tolist(), strict=True):
        core[place // 5, place % 5 + (place % 5 >= place // 5)] = value
    return F.linear(x, u @ core @ v.T, b)


def adamss(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    torch.manual_seed(0)
    u, _, v = torch.svd_lowrank(torch.cat((w, b[:, None]), 1), q=2, niter=2)
    means = KMeans(n_clusters=3, init="random", n_init=1, max_iter=10, random_state=123456789)
    rows, change = torch.from_numpy(means.fit_predict(u.numpy())), torch.zeros(10, 7)
    for k in range(3):
        change[rows == k] = t[f"adamss_B_{k}"] @ t[f"adamss_A_{k}"] @ v.T
    return F.linear(x, w + change[:, :-1], b + change[:, -1])


def osf(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    trained = t["osf_svd_params_U_low"] * t["osf_svd_params_S_low"] @ t["osf_svd_params_V_low"]
    return F.linear(x, u[:, :3] * s[:3] @ v[:3] + trained, b)  # half of six


FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "adamss": ("[W′ b′] = [W b] + B_k A_k N for the rows of cluster k", adamss),
    "deft": ("W′ = (I − P relu(P)ᵀ) W + s · P R", deft),
    "osf": ("W′ = U_h S_h V_h + U S V", osf),
    "frod": ("W′ = U (S + diag(l)) Vᵀ, S sparse, V shared", frod),
}
