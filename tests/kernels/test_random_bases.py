"""Random directions scaled twice: against the sum of products that defines them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inlay.kernels.random_bases import ScaledBases, drawn, scaled


def defined(a: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    n = outer.shape[0]
    return torch.stack([inner[i, j] * a[i] * outer[j] for i in range(len(a)) for j in range(n)])


@pytest.mark.parametrize(("r", "n", "m"), [(1, 1, 1), (2, 5, 7), (4, 1, 3), (3, 4, 12)])
def test_value_and_gradients(r: int, n: int, m: int) -> None:
    a = torch.randn(r, m, dtype=torch.float64)
    inner = torch.randn(r, n, dtype=torch.float64, requires_grad=True)
    outer = torch.randn(n, m, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(scaled(a, inner, outer), defined(a, inner, outer))
    assert torch.autograd.gradcheck(lambda i, o: ScaledBases.apply(a, i, o), (inner, outer))


def test_only_what_is_needed() -> None:
    a, inner, outer = torch.randn(2, 6), torch.randn(2, 3), torch.randn(3, 6, requires_grad=True)
    scaled(a, inner, outer).sum().backward()
    assert outer.grad is not None
    torch.testing.assert_close(outer.grad, inner.T @ a)


def test_a_slice_of_wider_bases_and_torch_func() -> None:
    a, inner, outer = torch.randn(2, 9)[:, :6], torch.randn(2, 3), torch.randn(3, 6)
    expected = torch.func.grad(lambda i: defined(a, i, outer).square().sum())(inner)
    found = torch.func.grad(lambda i: scaled(a, i, outer).square().sum())(inner)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("one_in", [None, 3, 10**0.5])
def test_bases_have_unit_spread_and_come_from_the_seed(one_in: float | None) -> None:
    a, b = drawn(4, 60, 90, 7, one_in)
    assert (a.shape, b.shape) == ((4, 1, 60), (90, 15, 4))
    for basis in (a, b):
        assert abs(float(basis.float().std()) - 1) < 0.02  # bfloat16 has 8 bits
        if one_in is not None:
            assert abs(float((basis != 0).float().mean()) - 1 / one_in) < 0.15
    again, other = drawn(4, 60, 90, 7, one_in), drawn(4, 60, 90, 8, one_in)
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])
    assert not torch.equal(b, other[1])


def test_a_basis_more_where_the_rank_does_not_divide() -> None:
    assert drawn(5, 12, 20, 0)[1].shape == (20, 3, 5)
