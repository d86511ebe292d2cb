"""What AdaLoRA and IncreLoRA share: how importance is averaged over the steps, and the loss that keeps ranks apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def take_in(now: Tensor, average: Tensor, strays: Tensor, beta1: float, beta2: float) -> None:
    """Take the importance of this step into Ī, its moving average, and Ū, that of how far it strays from Ī."""
    average.lerp_(now, 1 - beta1)
    strays.lerp_((now - average).abs(), 1 - beta2)


def orthogonality_loss(matrices: Sequence[Tensor]) -> Tensor:
    """The mean of ‖M Mᵀ − I‖ (Frobenius) over matrices (r, features): 0 where the rows of each are orthonormal."""
    parts = []
    for rows in matrices:
        eye = torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)
        parts.append(torch.linalg.matrix_norm(rows @ rows.t() - eye))
    return torch.stack(parts).mean()
