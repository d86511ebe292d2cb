"""Products with a matrix of circulant blocks by Fourier transforms, y = x Cᵀ, nothing of the matrix's size formed.

    C (m b, n b) has the blocks C_pq[j, a] = k_pq[(a − j) mod b],     k (m, n, b)
    ŷ_p = Σ_q x̂_q ⊙ k̂_pq*,     x̂_q = Σ_p ŷ_p ⊙ k̂_pq,     k̂_pq = Σ_t ŷ_p* ⊙ x̂_q       (back: of gradients)

The values are real, so half a spectrum does. Computed in fp32, or fp64. FLOPs: 4 T m n b each way, and the transforms.
Bytes kept: x and k; the spectrum of x is formed again in the backward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels.choice import fusible, without_autocast


def product(x: Tensor, kernel: Tensor, scale: float) -> Tensor:
    """s · x Cᵀ for x (…, n b) and k (m, n, b): (…, m b), in fp32 or fp64."""
    kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
    if not fusible(x, kernel):
        with without_autocast(x):
            return scale * plain(x.to(kernel.dtype), kernel)
    return cast(Tensor, CircularProduct.apply(x, kernel, scale))  # type: ignore[no-untyped-call]


def plain(x: Tensor, kernel: Tensor) -> Tensor:
    """x Cᵀ, in torch's own operations."""
    width = kernel.shape[-1]
    mixed = torch.matmul(spectrum(x, width), torch.fft.rfft(kernel).conj().permute(2, 1, 0))
    return values(mixed, width).reshape(*x.shape[:-1], -1)


def matrix(kernel: Tensor) -> Tensor:
    """C, (m b, n b)."""
    width = kernel.shape[-1]
    numbers = torch.arange(width, device=kernel.device)
    blocks = kernel[:, :, (numbers - numbers[:, None]) % width]
    return blocks.transpose(1, 2).reshape(kernel.shape[0] * width, -1)


def spectrum(x: Tensor, width: int) -> Tensor:
    """The transforms of the blocks of x (…, n b): (frequencies, T, n)."""
    found: Tensor = torch.fft.rfft(x.reshape(-1, x.shape[-1] // width, width))
    return found.permute(2, 0, 1)


def values(mixed: Tensor, width: int) -> Tensor:
    """The blocks that have these transforms, (frequencies, T, m): (T, m b)."""
    found: Tensor = torch.fft.irfft(mixed.permute(1, 2, 0), n=width)
    return found.flatten(1)


class CircularProduct(torch.autograd.Function):
    """s · x Cᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(x, kernel)
        with without_autocast(x):
            return plain(x.to(kernel.dtype), scale * kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        width = kernel.shape[-1]
        dx = dkernel = None
        with without_autocast(dy):
            left = spectrum(dy.to(kernel.dtype), width)
            if ctx.needs_input_grad[0]:
                mixed = torch.matmul(left, torch.fft.rfft(ctx.scale * kernel).permute(2, 0, 1))
                dx = values(mixed, width).reshape(x.shape).to(x.dtype)
            if ctx.needs_input_grad[1]:
                mixed = torch.matmul(left.mH, spectrum(x.to(kernel.dtype), width))
                dkernel = ctx.scale * torch.fft.irfft(mixed.permute(1, 2, 0), n=width)
        return dx, dkernel, None
