"""A matrix drawn around its mean from a mixture of Gaussians (MonteCLoRA), and how far that is from its prior.

    A′ = A + λ · ‖w‖ · diag(√v) Z,    v = σ² ⊙ χ,    χ ~ χ²(r),    Z (r, in) ~ N(0, 1),    w = softmax(μ + τ ⊙ ε)

This is A + λ Σ_n w_n diag(√v) Z_n with Z_n ~ N(0, 1) and Σ w_n = 1: a sum of independent Gaussians is a Gaussian, so
one draw stands for all of them. Its gradient by w is the mean of what N draws would give, with less variance.

    v    the diagonal of a Wishart matrix with r degrees of freedom and scale diag(σ²), with σ = exp(`log_std`)
    w    Laplace's approximation in softmax coordinates of Dir(α), with α = exp(`log_alpha`); only its diagonal is used
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_VARIANCE, LEAST_SHARE = 1e-3, 1e-6


class Draw(NamedTuple):
    """The noise of one draw that its parameters shape: χ (r) and ε (N)."""

    chi: Tensor
    epsilon: Tensor


def drawn(log_std: Tensor, log_alpha: Tensor) -> Draw:
    """Fresh noise in fp32, from torch's generator for the device."""
    square = torch.randn(len(log_std), len(log_std), device=log_std.device, dtype=torch.float32)
    return Draw(square.square().sum(1), torch.randn(len(log_alpha), device=log_std.device, dtype=torch.float32))


def variances(log_std: Tensor, chi: Tensor) -> Tensor:
    """v (r), not below 1e-3."""
    return ((2 * log_std.float()).exp() * chi).clamp(min=LEAST_VARIANCE)


def shares(log_alpha: Tensor, epsilon: Tensor) -> Tensor:
    """w (N), which sums to 1."""
    mean, n = log_alpha.float().clamp(min=math.log(LEAST_SHARE)), len(log_alpha)
    inverse = (-mean).exp()
    spread = (inverse * (1 - 2 / n) + inverse.sum() / n**2).clamp(min=LEAST_SHARE) + LEAST_SHARE
    return (mean - mean.mean() + spread.sqrt() * epsilon).softmax(0)


def perturbed(a: Tensor, v: Tensor, w: Tensor, noise: Tensor, scale: float) -> Tensor:
    """A′ (r, in) for A (r, in) and Z (r, in)."""
    size: Tensor = scale * torch.linalg.vector_norm(w) * v.sqrt()
    return a + size.to(a.dtype)[:, None] * noise


def dirichlet_divergence(log_alpha: Tensor, prior: float, compat: str | None = None) -> Tensor:
    """KL(Dir(α) ‖ Dir(prior …)). `compat="authors"`: with the sign that their code has for the terms ln Γ(α_n)."""
    alpha = log_alpha.float().exp()
    there = torch.full_like(alpha, prior)
    each = (alpha.lgamma() - there.lgamma()).sum()
    moved = ((alpha - there) * (alpha.digamma() - alpha.sum().digamma())).sum()
    return alpha.sum().lgamma() - there.sum().lgamma() + (each if compat else -each) + moved


def wishart_divergence(log_std: Tensor) -> Tensor:
    """KL(Wishart(r, diag(σ²)) ‖ Wishart(r, I))."""
    logs = 2 * log_std.float()
    return 0.5 * len(logs) * (logs.exp() - logs - 1).sum()


def normal_divergence(v: Tensor, samples: int) -> Tensor:
    """KL(N(0, diag(v)) ‖ N(0, I)), for each of so many columns."""
    return 0.5 * samples * (v - v.log() - 1).sum()
