"""The basis that several matrices share: it decomposes each of them, whatever their shapes."""

from __future__ import annotations

import pytest
import torch

from inlay.kernels.joint_bases import factors, shared_basis


@pytest.mark.parametrize("shapes", [[(9, 6), (9, 6), (4, 6)], [(6, 6)], [(2, 6), (2, 6)]])
def test_every_matrix_is_its_factors_in_the_shared_basis(shapes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in shapes]
    basis = shared_basis(weights, 1e-3)
    assert basis.shape == (6, 6)
    for weight, (u, lengths) in zip(weights, factors(weights, basis), strict=True):
        torch.testing.assert_close((u * lengths) @ basis.T, weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(u.norm(dim=0), torch.ones(6))
        assert (lengths > 0).all()


def test_two_matrices_have_orthogonal_left_sides() -> None:
    """With two matrices the decomposition is exact: that of the generalised singular values."""
    torch.manual_seed(0)
    weights = [torch.randn(9, 6), torch.randn(9, 6)]
    for u, _ in factors(weights, shared_basis(weights, 0.0)):
        torch.testing.assert_close(u.T @ u, torch.eye(6), rtol=0, atol=1e-4)  # two inverses and a decomposition in fp32


def test_a_singular_basis_leaves_what_it_cannot_reach() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 4)
    basis = torch.eye(4)
    basis[3] = 0
    basis[:, 3] = 0
    ((u, lengths),) = factors([weight], basis)
    assert u.isfinite().all()
    torch.testing.assert_close((u * lengths) @ basis.T, weight * torch.tensor([1.0, 1, 1, 0]))
