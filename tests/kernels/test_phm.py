"""Sums of Kronecker products: what is applied to activations is the matrix, which torch.kron writes out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inlay.kernels import phm


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)])
def test_factored_is_the_sum_of_kronecker_products(shape: tuple[int, ...], r: int) -> None:
    x, rule, left, right = leaf(*shape), leaf(4, 4, 4), leaf(4, 3, r), leaf(4, r, 2)
    matrix = sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(4))
    torch.testing.assert_close(phm.factored(x, rule, left, right), x @ matrix)
    assert torch.autograd.gradcheck(phm.factored, (x, rule, left, right))


def test_full_is_the_sum_of_kronecker_products() -> None:
    x, rule, blocks = leaf(5, 12), leaf(3, 3, 3), leaf(3, 4, 2)
    matrix = sum(torch.kron(rule[i], blocks[i]) for i in range(3))
    torch.testing.assert_close(phm.full(x, rule, blocks), x @ matrix)
    assert torch.autograd.gradcheck(phm.full, (x, rule, blocks))
