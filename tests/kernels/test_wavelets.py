"""The wavelets, and both ways of their inverse transform in two dimensions against the definition."""

from __future__ import annotations

import pytest
import torch
from oracles.plain_formulas import leaf
from torch import Tensor

from inlay.kernels import wavelets as kernel


@pytest.mark.parametrize("family", kernel.FAMILIES)
def test_the_filters_are_orthonormal_and_have_their_vanishing_moments(family: str) -> None:
    low, high = kernel.filters(family)
    moments, taps = int(family[2:]), len(low)
    assert taps == 2 * moments
    for shift in range(0, taps, 2):
        one = torch.eye(2, dtype=torch.float64) if shift == 0 else torch.zeros(2, 2, dtype=torch.float64)
        found = torch.stack([torch.stack([a[shift:] @ b[: taps - shift] for a in (low, high)]) for b in (low, high)])
        torch.testing.assert_close(found, one, rtol=0, atol=1e-10)
    points = torch.linspace(-1, 1, taps, dtype=torch.float64)
    assert max(float((high * points**k).sum().abs()) for k in range(moments)) < 1e-9


def defined(c: Tensor, flat: Tensor, shape: tuple[int, int], both: Tensor) -> Tensor:
    """Number by number: the middle of a matrix of coefficients, each a patch, and of these the middle."""
    taps = both.shape[1]
    sizes = [size + taps - 2 + size % 2 for size in shape]
    whole = c.new_zeros(sizes[0] + 2 * taps, sizes[1] + 2 * taps)
    for place, value in zip(flat.tolist(), c, strict=True):
        p, q = place // shape[1] + (sizes[0] - shape[0]) // 2, place % shape[1] + (sizes[1] - shape[1]) // 2
        row, column = 2 * (p % (sizes[0] // 2)), 2 * (q % (sizes[1] // 2))
        patch = torch.outer(both[int(q >= sizes[1] // 2)], both[int(p >= sizes[0] // 2)])
        whole[row : row + taps, column : column + taps] += value * patch
    return whole[taps - 2 : taps - 2 + shape[0], taps - 2 : taps - 2 + shape[1]]


@pytest.mark.parametrize("family", ["db1", "db2", "db5"])
@pytest.mark.parametrize("shape", [(6, 8), (7, 9), (2, 5), (1, 1)])
def test_both_ways_are_the_definition(family: str, shape: tuple[int, int]) -> None:
    both, size = kernel.filters(family), shape[0] * shape[1]
    flat = torch.randperm(size)[: (size + 1) // 2]
    c = leaf(len(flat), dtype=torch.float64, grad=False)
    expected, where = defined(c, flat, shape, both), kernel.coefficients(flat, shape, both.shape[1])
    patched = kernel.spread(c, kernel.patches(where, shape, both), size).view(shape)
    bands = kernel.spread(c, kernel.strips(where, shape, both), 2 * where.half * shape[1]).view(2, where.half, -1)
    torch.testing.assert_close(patched, expected)
    torch.testing.assert_close(kernel.raised(bands, shape, both), expected)
