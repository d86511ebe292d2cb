"""Methods whose places share random projections or a bank of vectors: their formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS: dict[str, dict[str, Any]] = {
    "pvera": {"r": 2},
    "randlora": {"r": 2, "alpha": 4},
    "tinylora": {"r": 2, "u": 3},
    "unilora": {"r": 2, "theta_d_length": 3},
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 2},
    "vera": {"r": 2},
}


def drawn(rows: int, r: int) -> tuple[Tensor, Tensor]:
    """A and B for a linear from 6 to 10, as the default seed gives them."""
    generator = torch.Generator().manual_seed(0)
    a = torch.empty(rows, 6).uniform_(-1, 1, generator=generator)
    b = torch.empty(10, r).uniform_(-1, 1, generator=generator)
    return a * (6 / 6) ** 0.5, b * (6 / r) ** 0.5


def vera(x: Tensor, w: Tensor, b: Tensor, vera_lambda_b: Tensor, vera_lambda_d: Tensor) -> Tensor:
    first, second = drawn(2, 2)
    return F.linear(x, w, b) + vera_lambda_b * F.linear(vera_lambda_d * F.linear(x, first), second)


def pvera(x: Tensor, w: Tensor, b: Tensor, pvera_lambda_b: Tensor, pvera_lambda_d: Tensor) -> Tensor:
    first, second = drawn(4, 2)
    mean = pvera_lambda_d[:2] * F.linear(x, first[:2])  # and no noise: hosts are in evaluation mode
    return F.linear(x, w, b) + pvera_lambda_b * F.linear(mean, second)


def randlora(x: Tensor, w: Tensor, b: Tensor, randlora_lambda: Tensor, randlora_gamma: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    a = torch.empty(2, 6, dtype=torch.bfloat16).uniform_(-(6**-0.5), 6**-0.5, generator=generator)
    parts = [torch.empty(10, 2, dtype=torch.bfloat16) for _ in range(3)]
    columns = torch.stack([part.uniform_(-(2**-0.5), 2**-0.5, generator=generator) for part in parts], dim=1).flatten(1)
    a, columns = (a / a.std()).float(), (columns / columns.std()).float()
    change = sum(
        columns[:, j::3] @ torch.diag(randlora_lambda[:, j]) @ a @ torch.diag(randlora_gamma[j]) for j in range(3)
    )
    return F.linear(x, w + 4 / 2 * change, b)


def vblora(x: Tensor, w: Tensor, b: Tensor, shared_vblora_vector_bank: Tensor, **t: Tensor) -> Tensor:
    def vector(logits: Tensor) -> Tensor:
        first, second = logits.argsort(descending=True)[:2]
        share = torch.sigmoid(logits[first] - logits[second])
        return share * shared_vblora_vector_bank[first] + (1 - share) * shared_vblora_vector_bank[second]

    rows = torch.stack([torch.cat([vector(piece) for piece in row]) for row in t["vblora_logits_A"]])
    columns = [torch.cat([vector(piece) for piece in column]) for column in t["vblora_logits_B"].transpose(0, 1)]
    return F.linear(x, w + torch.stack(columns, dim=1) @ rows, b)


def tinylora(x: Tensor, w: Tensor, b: Tensor, shared_tinylora_v_0: Tensor) -> Tensor:
    drawn = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(42)) / 2**0.5
    u, s, v = torch.linalg.svd(w)
    core = (shared_tinylora_v_0[:, None, None] * drawn).sum(0)
    root = torch.diag(s[:2].sqrt())
    return F.linear(x, w + u[:, :2] @ root @ core @ root @ v[:2], b)


def unilora(x: Tensor, w: Tensor, b: Tensor, shared_unilora_theta_d: Tensor) -> Tensor:
    generator = np.random.default_rng(42)  # 12 entries of A and 20 of B, from a vector of 3
    indices = np.concatenate([np.repeat(np.arange(3), 10), generator.choice(3, size=2, replace=False)])
    generator.shuffle(indices)
    theta = shared_unilora_theta_d / torch.tensor([float(sum(indices == k)) for k in range(3)]).sqrt()
    entries = theta[torch.tensor(indices)]
    return F.linear(x, w + entries[12:].view(10, 2) @ entries[:12].view(2, 6), b)


FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "pvera": ("y = W x + b ⊙ B (μ + ε ⊙ exp(v / 2)), [μ ; v] = d ⊙ A x", pvera),
    "randlora": ("W′ = W + s · Σ_j B_j Λ_j A Γ_j", randlora),
    "tinylora": ("W′ = W + B (Σ_i v_i P_i) A, A and B from the SVD of W", tinylora),
    "unilora": ("W′ = W + B A, A = θ′[I_A], B = θ′[I_B]", unilora),
    "vblora": ("W′ = W + B A, pieces of A and B = Σ_j softmax(top-k(l))_j · bank[j]", vblora),
    "vera": ("y = W x + b ⊙ B (d ⊙ A x)", vera),
}
