"""The transform of a sparse spectrum, both ways of it, against torch's own of the whole spectrum."""

from __future__ import annotations

import pytest
import torch
from oracles.plain_formulas import close, gradients, leaf
from torch import Tensor

from inlay.kernels import fourier as kernel


def whole(c: Tensor, where: kernel.Frequencies, shape: tuple[int, int]) -> Tensor:
    spectrum = c.new_zeros(shape).index_put((where.rows, where.columns), c)
    return torch.fft.ifft2(spectrum).real


@pytest.mark.parametrize("shape", [(6, 8), (7, 8), (6, 9), (7, 5), (1, 6), (6, 1), (2, 2)])  # with its own mirrors
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_as_the_whole_transform(shape: tuple[int, int], share: float) -> None:
    count = max(1, int(share * shape[0] * shape[1]))
    where, c = kernel.frequencies(count, shape, 3), leaf(count, dtype=torch.float64)
    expected, (a, b) = whole(c, where, shape), kernel.waves(c, where, shape)
    (slope,) = gradients(expected, c)
    for found in (kernel.transformed(c, where, shape), b @ a / (shape[0] * shape[1])):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(found, c)[0], slope)


def test_in_single_precision() -> None:
    where, c = kernel.frequencies(50, (64, 48), 3), leaf(50)
    exact = whole(c.double(), where, (64, 48))
    a, b = kernel.waves(c, where, (64, 48))
    close(kernel.transformed(c, where, (64, 48)), exact, 10)
    close(b @ a / (64 * 48), exact, 10)


def test_half_precision_goes_through_fp32() -> None:
    where, c = kernel.frequencies(5, (6, 4), 3), leaf(5, dtype=torch.bfloat16)
    assert kernel.transformed(c, where, (6, 4)).dtype == torch.float32
    assert kernel.waves(c, where, (6, 4))[0].dtype == torch.float32
