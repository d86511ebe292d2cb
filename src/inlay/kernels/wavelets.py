"""One step of an inverse wavelet transform in two dimensions, of coefficients c_k at n places (p_k, q_k).

The coefficients are a matrix of four quarters, as HF peft lays them out: each of its halves, up and down, left and
right, is the low or the high band of one direction. Every coefficient becomes a patch of taps × taps entries, the outer
product of two filters. Few or small patches are a sparse matrix (`patches`). Otherwise the coefficients are spread
along the rows (`strips`), and these transformed down the columns (`raised`).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FAMILIES = tuple(f"db{number}" for number in range(1, 11))
"""Daubechies' wavelets, by their vanishing moments; db1 is Haar's."""


class Spread(NamedTuple):
    """Where each coefficient goes, and times what."""

    slots: Tensor
    """(n, j), into a flattened result."""
    weights: Tensor
    """(n, j), 0 for what falls outside."""


def spread(c: Tensor, to: Spread, size: int) -> Tensor:
    """The flattened result, (size)."""
    c = c.to(torch.promote_types(c.dtype, torch.float32))
    return c.new_zeros(size).index_add(0, to.slots.flatten(), (c[:, None] * to.weights.to(c.dtype)).flatten())


@functools.cache
def filters(family: str) -> Tensor:
    """The low and the high filter of the inverse transform, (2, taps), in double precision.

    |H|² is a polynomial in y = sin²(ω / 2) with `moments` zeros at π; of its others H has those inside the circle.
    """
    moments = int(family[2:])
    taps = torch.ones(1, dtype=torch.complex128)
    zeros = [-1.0 + 0j] * moments
    if moments > 1:
        series = torch.tensor([math.comb(moments - 1 + k, k) for k in range(moments)], dtype=torch.float64)
        companion = torch.diag(torch.ones(moments - 2, dtype=torch.float64), -1)
        companion[:, -1] = -series[:-1] / series[-1]
        for y in torch.linalg.eigvals(companion).tolist():
            inside = 1 - 2 * y + ((1 - 2 * y) ** 2 - 1) ** 0.5
            zeros.append(inside if abs(inside) < 1 else 1 / inside)
    for zero in zeros:
        taps = torch.cat((taps, taps.new_zeros(1))) - zero * torch.cat((taps.new_zeros(1), taps))
    low = taps.real * (math.sqrt(2) / taps.real.sum())
    signs = 1 - 2 * (torch.arange(len(low)) % 2)
    return torch.stack((low, signs * low.flip(0)))


class Coefficients(NamedTuple):
    """Places of coefficients: their numbers within a band, (n), and whether that is the high one, by direction."""

    down: Tensor
    across: Tensor
    high_down: Tensor
    high_across: Tensor
    half: int
    """Length of a band, down."""


def coefficients(flat: Tensor, shape: tuple[int, int], taps: int) -> Coefficients:
    """The places that flat indices into a matrix of this shape mean, which lies in the middle of the coefficients."""
    halves = [(size + taps - 1) // 2 for size in shape]
    down, across = (
        index + (2 * half - size) // 2
        for index, half, size in zip((flat // shape[1], flat % shape[1]), halves, shape, strict=True)
    )
    # The band down the columns is told by the half across, and the other way round.
    return Coefficients(down % halves[0], across % halves[1], across >= halves[1], down >= halves[0], halves[0])


def reach(number: Tensor, high: Tensor, length: int, both: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries of a line of this length the coefficients make up, (n, taps), and times what."""
    taps = both.shape[1]
    at = 2 * number[:, None] - (taps - 2) + torch.arange(taps)
    inside = (at >= 0) & (at < length)
    return at.clamp(0, length - 1), both[high.long()] * inside


def patches(where: Coefficients, shape: tuple[int, int], both: Tensor) -> Spread:
    """Coefficients to the entries of the matrix."""
    rows, down = reach(where.down, where.high_down, shape[0], both)
    columns, across = reach(where.across, where.high_across, shape[1], both)
    slots = rows[:, :, None] * shape[1] + columns[:, None]
    return Spread(slots.flatten(1), (down[:, :, None] * across[:, None]).flatten(1))


def strips(where: Coefficients, shape: tuple[int, int], both: Tensor) -> Spread:
    """Coefficients to the entries of both bands of rows, (2, half, in)."""
    columns, across = reach(where.across, where.high_across, shape[1], both)
    rows = where.high_down * where.half + where.down
    return Spread(rows[:, None] * shape[1] + columns, across)


def raised(bands: Tensor, shape: tuple[int, int], both: Tensor) -> Tensor:
    """The matrix, from both bands of its rows, (2, half, in)."""
    taps = both.shape[1]
    kernel = both.to(bands.dtype).view(2, 1, taps, 1)
    return F.conv_transpose2d(bands[None], kernel, stride=(2, 1))[0, 0, taps - 2 : taps - 2 + shape[0]]
