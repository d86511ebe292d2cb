"""Methods with numbers at fixed positions: their formulas, from the tensors that they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 2},
    "fourierft": {"n_frequency": 3, "scaling": 60.0},
    "glora": {"r": 2},
    "peanut": {"r": 2},
    "shira": {"r": 2, "random_seed": 0},
    "supertuning": {"sparsity": 0.95},
    "waveft": {"n_frequency": 3, "scaling": 2.0},
}


def drawn(count: int, seed: int) -> Tensor:
    """Places in the linear from 6 to 10 features."""
    return torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:count]


def c3a(x: Tensor, w: Tensor, b: Tensor, c3a_kernel: Tensor) -> Tensor:
    entries = [c3a_kernel[p // 2, q // 2, (q - p) % 2] for p in range(10) for q in range(6)]
    return F.linear(x, w + torch.stack(entries).view(10, 6) / 6, b)


def fourierft(x: Tensor, w: Tensor, b: Tensor, fourierft_spectrum: Tensor) -> Tensor:
    spectrum = torch.zeros(60).index_put((drawn(3, 777),), fourierft_spectrum).view(10, 6)
    return F.linear(x, w + 60 * torch.fft.ifft2(spectrum).real, b)


def glora(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    shares, amounts, coupling = (t[f"glora_{letter}_Xd"] @ t[f"glora_{letter}_Xu"] for letter in "ABC")
    bias = b + b * t["glora_D_X"] + t["glora_E_X"] + (w @ coupling).flatten()
    return F.linear(x, w + w * shares + amounts, bias)


def peanut(x: Tensor, w: Tensor, b: Tensor, peanut_A_weight: Tensor, peanut_B_weight: Tensor) -> Tensor:
    return F.linear(x, w + peanut_B_weight @ F.relu(peanut_A_weight @ w), b)


def shira(x: Tensor, w: Tensor, b: Tensor, shira_weight: Tensor) -> Tensor:
    change = torch.zeros(60).index_put((drawn(32, 0).sort().values,), shira_weight)
    return F.linear(x, w + change.view(10, 6), b)


def supertuning(x: Tensor, w: Tensor, b: Tensor, supertuning_values: Tensor) -> Tensor:
    largest = w.abs().flatten().argsort(descending=True)[:3].sort().values
    return F.linear(x, w + torch.zeros(60).index_put((largest,), supertuning_values).view(10, 6), b)


def waveft(x: Tensor, w: Tensor, b: Tensor, waveft_spectrum: Tensor) -> Tensor:
    """Haar's wavelet: each number is a block of 2 × 2 halves, with signs by its quarter."""
    change = torch.zeros(10, 6)
    for place, c in zip(drawn(3, 777).tolist(), waveft_spectrum, strict=True):
        p, q = divmod(place, 6)
        row, column = 2 * (p % 5), 2 * (q % 3)
        down, across = torch.tensor([1.0, -1.0 if q >= 3 else 1.0]), torch.tensor([1.0, -1.0 if p >= 5 else 1.0])
        change[row : row + 2, column : column + 2] += c / 2 * down[:, None] * across
    return F.linear(x, w + 2 * change, b)


FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "c3a": ("W′ = W + C / d_in, C of circulant blocks", c3a),
    "fourierft": ("W′ = W + s · Re ifft2(S), S sparse at fixed random places", fourierft),
    "glora": ("W′ = W + W ⊙ A + B, b′ = b + b ⊙ D + E + W C", glora),
    "peanut": ("W′ = W + s · B f(A W)", peanut),
    "shira": ("W′ = W + S, S sparse at fixed random places", shira),
    "supertuning": ("W′ = W + S, S sparse where |W| is largest", supertuning),
    "waveft": ("W′ = W + s · IDWT(S), S sparse at fixed random places", waveft),
}
