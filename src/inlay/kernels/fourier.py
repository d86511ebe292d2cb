"""The real part of an inverse Fourier transform in two dimensions, of a spectrum with n real numbers in it.

    D[j, a] = Re ifft2(S)[j, a] = 1 / (out in) · Σ_k c_k cos(2π (j p_k / out + a q_k / in)),     S[p_k, q_k] = c_k

The real part of any spectrum is the transform of its conjugate-symmetric part, of which half the columns do; and of
these only the ones with a number in them are transformed along the first dimension. Or, since the cosine of a sum is
cos cos − sin sin, D is a product of two factors of 2 n waves, which wins for small n.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inlay.kernels.positions import drawn


class Frequencies(NamedTuple):
    """Where in the spectrum the n numbers are, and where that puts them in the half that is transformed."""

    rows: Tensor
    """p (n)."""
    columns: Tensor
    """q (n)."""
    kept: Tensor
    """The columns of the half spectrum with a number in them, (u)."""
    slots: Tensor
    """Into (out, u) flattened, one or two for each number."""
    source: Tensor
    """Which number each slot holds."""


def frequencies(count: int, shape: tuple[int, int], seed: int) -> Frequencies:
    """So many distinct frequencies, at random, as HF peft draws them."""
    flat, half = drawn(count, shape[0] * shape[1], seed), shape[1] // 2 + 1
    rows, columns = flat // shape[1], flat % shape[1]
    both = torch.cat((columns, -columns % shape[1])), torch.cat((rows, -rows % shape[0]))
    inside = (both[0] < half).nonzero().flatten()
    kept, number = torch.unique(both[0][inside], return_inverse=True)
    return Frequencies(rows, columns, kept, both[1][inside] * len(kept) + number, inside % count)


def transformed(c: Tensor, where: Frequencies, shape: tuple[int, int]) -> Tensor:
    """D (out, in), by fast Fourier transforms."""
    c = c.to(torch.promote_types(c.dtype, torch.float32))
    entries = torch.complex(c[where.source] / 2, c.new_zeros(()))  # half of each number, and half of its mirror image
    spectrum = entries.new_zeros(shape[0] * len(where.kept)).index_add(0, where.slots, entries)
    columns = torch.fft.ifft(spectrum.view(shape[0], -1), dim=0)
    whole = columns.new_zeros(shape[0], shape[1] // 2 + 1).index_copy(1, where.kept, columns)
    found: Tensor = torch.fft.irfft(whole, n=shape[1])
    return found


def waves(c: Tensor, where: Frequencies, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A (2 n, in) and B (out, 2 n) with D = B A / (out in); the numbers are in A."""
    c = c.to(torch.promote_types(c.dtype, torch.float32))
    down, up = wave(where.columns, shape[1], c), wave(where.rows, shape[0], c)
    return torch.cat((c[:, None] * down[0], -c[:, None] * down[1])), torch.cat(up).t()


def wave(frequency: Tensor, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of these frequencies at each of `length` points, (n, length)."""
    points = torch.arange(length, device=frequency.device)
    angles = points.double() * (2 * math.pi / length)
    at = frequency[:, None] * points % length
    return angles.cos().to(like.dtype)[at], angles.sin().to(like.dtype)[at]
