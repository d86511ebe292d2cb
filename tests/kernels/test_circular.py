"""Products with circulant blocks against the matrix, and what the function keeps."""

from __future__ import annotations

import pytest
import torch
from oracles.plain_formulas import close, gradients, kept, leaf

from inlay.kernels import circular as kernel


@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", [(1,), (3, 2)])
def test_as_the_matrix(width: int, shape: tuple[int, ...]) -> None:
    x, k = leaf(*shape, 3 * width, dtype=torch.float64), leaf(2, 3, width, dtype=torch.float64)
    found, expected = kernel.product(x, k, 0.3), 0.3 * x @ kernel.matrix(k).t()
    close(found, expected, 20)
    for one, other in zip(gradients(found, x, k), gradients(expected, x, k), strict=True):
        close(one, other, 20)


def test_the_matrix_has_circulant_blocks() -> None:
    blocks = kernel.matrix(torch.tensor([[[0, 1, 2], [3, 4, 5]]]))
    assert blocks.tolist() == [[0, 1, 2, 3, 4, 5], [2, 0, 1, 5, 3, 4], [1, 2, 0, 4, 5, 3]]


def test_half_precision_goes_through_fp32() -> None:
    x, k = leaf(7, 8, dtype=torch.bfloat16), leaf(2, 2, 4, dtype=torch.bfloat16)
    found = kernel.product(x, k, 1.0)
    close(found, x.float() @ kernel.matrix(k.float()).t())
    assert [t.dtype for t in gradients(found, x, k)] == [torch.bfloat16] * 2


def test_keeps_x_and_k_only() -> None:
    x, k = leaf(7, 8), leaf(2, 2, 4)
    with kept(x, k) as saved:
        kernel.product(x, k, 1.0)
    assert saved == []


def test_under_torch_func() -> None:
    x, k = leaf(7, 8, grad=False), leaf(2, 2, 4, grad=False)
    found = torch.func.grad(lambda t: kernel.product(x, t, 1.0).square().sum())(k)
    expected = torch.func.grad(lambda t: (x @ kernel.matrix(t).t()).square().sum())(k)
    close(found, expected, 20)
