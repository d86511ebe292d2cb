"""Outputs turned in pairs: the product with RoAD's sparse matrix, with its gradients, in any precision."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles.plain_formulas import close, gradients, kept, leaf, size, twin
from torch import Tensor

from inlay.kernels.paired import Turn, turned

BOTH = torch.autograd.gradcheck, torch.autograd.gradgradcheck


def matrix(a: Tensor, s: Tensor, half: int) -> Tensor:
    """R, entry by entry."""
    result = torch.diag(a)
    for row in range(len(a)):
        first = row % (2 * half) < half
        partner = row + half if first else row - half
        result = result + torch.zeros_like(result).index_put(
            (torch.tensor(row), torch.tensor(partner)), -s[row] if first else s[row]
        )
    return result


def columns(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    a, s = 0.1 * torch.randn(2, n, dtype=dtype)
    return (1 + a).requires_grad_(), s.clone().requires_grad_()


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[:-1])
def test_both_derivatives_are_those_of_finite_differences(needs: tuple[bool, bool, bool]) -> None:
    tensors = [leaf(2, 3, 8, dtype=torch.float64), *columns(8, torch.float64)]
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)
    for check in BOTH:
        assert check(lambda z, a, s: Turn.apply(z, a, s, 2), tensors)


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (12,), (0, 12)])
@pytest.mark.parametrize("half", [1, 2, 3, 6])
def test_it_is_the_product_with_the_matrix(half: int, shape: tuple[int, ...]) -> None:
    z, (a, s) = leaf(*shape), columns(12)
    exact = [twin(z), twin(a), twin(s)]
    y, truth = turned(z, a, s, half), exact[0] @ matrix(exact[1], exact[2], half).T
    close(y, truth)
    if z.numel():
        for found, expected in zip(gradients(y, z, a, s), gradients(truth, *exact), strict=True):
            close(found, expected, 8)


def test_half_precision_is_rounded_finely_and_no_turn_gives_the_bits() -> None:
    z, (a, s) = leaf(64, 32).detach().bfloat16(), columns(32)
    truth = z.double() @ matrix(a, s, 4).double().T
    found = turned(z, a, s, 4)
    assert found.dtype == torch.bfloat16
    assert (found.double() - truth).norm() < 0.004 * truth.norm()
    da, ds = gradients(found, a, s)
    assert da.dtype == ds.dtype == torch.float32
    assert torch.equal(turned(z, torch.ones(32), torch.zeros(32), 4), z)


def test_z_is_all_that_is_kept() -> None:
    z, (a, s) = leaf(64, 32), columns(32)
    with kept(z, a, s) as tensors:
        turned(z, a, s, 4)
    assert size(tensors) == 0


def test_compiled() -> None:
    z, (a, s) = torch.randn(5, 12), columns(12)
    close(torch.compile(turned, fullgraph=True, backend="eager")(z, a, s, 3), turned(z, a, s, 3))
