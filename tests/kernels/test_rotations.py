"""Rotations of activations by blocks, and the orthogonal matrices that they are made of."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles.plain_formulas import close, gradients, kept, leaf, size, twin
from torch import Tensor

from inlay.kernels import rotations
from inlay.kernels.rotations import Rotate, cayley, neumann, packed, projected, rotated, skew

BOTH = torch.autograd.gradcheck, torch.autograd.gradgradcheck


def plain(x: Tensor, change: Tensor) -> Tensor:
    """x diag(I + D_1, …)."""
    n, b, _ = change.shape
    blocks = [torch.eye(b, dtype=change.dtype) + d for d in change.expand(x.shape[-1] // b if n == 1 else n, b, b)]
    return x @ torch.block_diag(*blocks)


# -- turning x ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2))[:-1])
def test_both_derivatives_are_those_of_finite_differences(needs: tuple[bool, bool]) -> None:
    x, change = (leaf(*s, dtype=torch.float64, grad=g) for s, g in zip(((2, 3, 6), (2, 3, 3)), needs, strict=True))
    for check in BOTH:
        assert check(Rotate.apply, (x, change))


@pytest.mark.parametrize("shape", [(7, 48), (2, 3, 48), (48,), (0, 48)])
@pytest.mark.parametrize(("n", "b"), [(1, 4), (12, 4), (16, 3), (3, 16), (1, 48), (24, 2)])
def test_it_is_the_product_with_the_block_diagonal_matrix(shape: tuple[int, ...], n: int, b: int) -> None:
    x, change = leaf(*shape), (0.3 * torch.randn(n, b, b)).requires_grad_()
    exact = [twin(x), twin(change)]
    y, truth = rotated(x, change), plain(*exact)
    close(y, truth)
    if x.numel():
        for found, expected in zip(gradients(y, x, change), gradients(truth, *exact), strict=True):
            close(found, expected, 8)


def test_a_transposed_input() -> None:
    x, change = torch.randn(48, 5).T, torch.randn(3, 16, 16)
    close(rotated(x, change), plain(x.double(), change.double()), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rotation_gives_the_very_bits(dtype: torch.dtype) -> None:
    x = torch.randn(9, 24).to(dtype)
    for b in (2, 4, 24):
        assert torch.equal(rotated(x, neumann(skew(torch.zeros(24 // b, b * (b - 1) // 2), b), 5)), x)


def test_an_angle_of_a_thousandth_is_not_lost_in_half_precision() -> None:
    """Rounded to bf16, cos stands at one and R is no rotation; D is small, and is rounded finely."""
    change = cayley(skew(torch.full((1, 1), 0.01), 2))
    x = torch.randn(4000, 2).bfloat16()
    truth = plain(x.double(), change.double()) - x.double()
    assert (change.bfloat16().double() - change.double()).abs().max() < 0.004 * change.abs().max()
    moved = rotated(x, change).double() - x.double()
    assert float((moved * truth).sum() / truth.square().sum()) == pytest.approx(1, rel=0.1)


def test_x_and_the_blocks_are_all_that_is_kept() -> None:
    x, change = leaf(64, 32), leaf(2, 16, 16)
    with kept(x, change) as tensors:
        rotated(x, change)
    assert size(tensors) == 0


def test_compiled() -> None:
    x, change = torch.randn(5, 24), torch.randn(6, 4, 4)
    found = torch.compile(rotated, fullgraph=True, backend="eager")(x, change)
    close(found, rotated(x, change))


@pytest.mark.parametrize(("n", "b", "times"), [(12, 4, 4), (6, 4, 3), (7, 2, 7), (5, 4, 1), (2, 20, 1)])
def test_small_blocks_are_put_together(n: int, b: int, times: int) -> None:
    change = torch.randn(n, b, b)
    found = packed(change)
    assert found.shape == (n // times, times * b, times * b)
    assert times * b <= max(rotations.WIDE, b)
    assert torch.equal(torch.block_diag(*found), torch.block_diag(*change))


# -- orthogonal matrices -----------------------------------------------------------------------------------------------


def test_a_skew_symmetric_matrix_from_its_entries() -> None:
    q = skew(torch.arange(1.0, 7).expand(2, 6), 4)
    assert torch.equal(q[1], torch.tensor([[0.0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]))


def test_cayleys_matrix_is_orthogonal_and_the_series_tends_to_it() -> None:
    q = skew(0.1 * torch.randn(3, 28, dtype=torch.float64), 8)
    identity = torch.eye(8, dtype=torch.float64)
    exact = identity + cayley(q)
    close(exact @ exact.mT, identity.expand(3, 8, 8), 16)
    close(exact @ (identity - q), identity + q, 16)
    distances = [float((neumann(q, terms) - cayley(q)).abs().max()) for terms in (2, 4, 6, 12, 40)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-9
    close(neumann(q, 5), 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q, 16)
    assert torch.equal(neumann(q, 3), neumann(q, 4))


def test_cayleys_matrix_of_half_precision_is_solved_in_fp32() -> None:
    q = skew(torch.randn(1, 28), 8).bfloat16()
    close(cayley(q), cayley(q.double()), 1)


def test_a_projection_has_the_norm_and_passes_the_gradient_on() -> None:
    entries = torch.tensor([[3.0, 0, 4], [0.01, 0, 0], [0, 0, 0]], requires_grad=True)
    found = projected(entries, 0.5)
    bound = 0.5 / 3**0.5
    assert float(torch.linalg.matrix_norm(skew(found, 3))[0].detach()) == pytest.approx(bound)
    assert torch.equal(found[1:], entries[1:])
    (gradient,) = torch.autograd.grad(found, entries, torch.ones(3, 3))
    assert torch.equal(gradient, torch.ones(3, 3))
