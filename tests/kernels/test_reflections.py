"""Chains of Householder reflections: the compact form is their product, and where they cancel the identity."""

from __future__ import annotations

import pytest
import torch
from oracles.plain_formulas import close, gradients, twin
from torch import Tensor

from inlay.kernels.reflections import middle, mirrored, pairs, reflected


def chain(u: Tensor) -> Tensor:
    """H_1 … H_r."""
    product = torch.eye(u.shape[0], dtype=u.dtype)
    for column in u.T:
        product = product - 2 * torch.outer(product @ column, column) / (column @ column)
    return product


def fast(x: Tensor, u: Tensor) -> Tensor:
    v = pairs(u)
    return reflected(x, v, middle(v))


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (12,), (0, 12)])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 8, 11])
def test_it_is_the_product_of_the_reflections(r: int, shape: tuple[int, ...]) -> None:
    x, u = torch.randn(*shape, requires_grad=True), torch.randn(12, r, requires_grad=True)
    exact = [twin(x), twin(u)]
    y, truth = fast(x, u), exact[0] @ chain(exact[1]).T
    close(y, truth, 16)
    if x.numel():
        for found, expected in zip(gradients(y, x, u), gradients(truth, *exact), strict=True):
            close(found, expected, 64)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_derivatives_are_those_of_finite_differences(r: int) -> None:
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 6), (6, r))]
    assert torch.autograd.gradcheck(fast, tensors)
    assert torch.autograd.gradgradcheck(fast, tensors)
    assert torch.autograd.gradcheck(mirrored, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [2, 8, 32])
def test_equal_pairs_give_the_very_bits(r: int, dtype: torch.dtype) -> None:
    x, u = torch.randn(50, 40).to(dtype), torch.randn(40, r // 2).repeat_interleave(2, dim=1)
    assert torch.equal(fast(x, u), x)


def test_the_order_counts_and_the_lengths_do_not() -> None:
    x, u = torch.randn(5, 12), torch.randn(12, 4)
    assert (fast(x, u) - fast(x, u.flip(1))).abs().max() > 0.1
    close(fast(x, u * torch.tensor([0.1, 3, 7, 0.5])), fast(x, u), 64)


def test_half_precision_is_near() -> None:
    x, u = torch.randn(50, 40), torch.randn(40, 8)
    found = fast(x.bfloat16(), u)
    assert found.dtype == torch.bfloat16
    assert (found.float() - fast(x, u)).norm() < 0.02 * x.norm()


def test_a_mirror_image_of_the_space_that_the_vectors_span() -> None:
    x, u = torch.randn(5, 12), torch.randn(12, 3)
    q = torch.linalg.qr(u.double())[0]
    close(mirrored(x, u), x.double() @ chain(q), 16)
    close(mirrored(u.T, u), -u.T, 16)


def test_compiled() -> None:
    x, u = torch.randn(5, 12), torch.randn(12, 5)
    close(torch.compile(fast, fullgraph=True, backend="eager")(x, u), fast(x, u))
