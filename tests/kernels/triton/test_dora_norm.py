"""The norm of each row of W + s · B A, against the norm of the matrix."""

from __future__ import annotations

import pytest
import torch

from inlay.errors import ConfigError
from inlay.kernels.triton import dora_norm

# Sums of at most a hundred squares and products in float32, in another order; norms are about 9.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(37, 70, 5), (16, 32, 16), (3, 90, 40)])
def test_equals_the_norm_of_the_matrix(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    w, a, b = torch.randn(rows, columns).to(dtype), torch.randn(rank, columns), torch.randn(rows, rank)
    expected = dora_norm.reference(w, a, b, 0.3)
    known = w.float().square().sum(1)
    for norms in (dora_norm.row_norms(w, a, b, 0.3), dora_norm.row_norms(w, a, b, 0.3, known)):
        assert norms.dtype == torch.float32
        torch.testing.assert_close(norms, expected, **CLOSE)


def test_takes_factors_in_the_dtype_of_the_weight() -> None:
    w, a, b = (torch.randn(*size).bfloat16() for size in ((20, 50), (4, 50), (20, 4)))
    torch.testing.assert_close(dora_norm.row_norms(w, a, b, 1.5), dora_norm.reference(w, a, b, 1.5), **CLOSE)


def test_before_training_it_is_the_norm_of_the_weight() -> None:
    w = torch.randn(20, 50)
    norms = dora_norm.row_norms(w, torch.randn(4, 50), torch.zeros(20, 4), 1.5)
    torch.testing.assert_close(norms, w.norm(dim=1), **CLOSE)


def test_a_row_that_vanishes_has_a_positive_norm() -> None:
    a = torch.eye(4, 16)
    w = -(torch.ones(3, 4) @ a)
    norms = dora_norm.row_norms(w, a, torch.ones(3, 4), 1.0)
    assert (norms > 0).all()
    assert (norms < 1e-3).all()


def test_squares_of_another_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"w_squared is torch.float64 of shape"):
        dora_norm.row_norms(torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2), 1.0, torch.ones(3).double())
