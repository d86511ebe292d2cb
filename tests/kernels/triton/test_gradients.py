"""dh and dB from one read of dy, against torch and against autograd."""

from __future__ import annotations

import pytest
import torch

from inlay.errors import ConfigError
from inlay.kernels.triton import gradients, partial_sums

SIZES = [(70, 75, 5), (1, 33, 1), (32, 64, 16), (50, 40, 20)]


@pytest.mark.parametrize(("rows", "columns", "rank"), SIZES)
def test_equals_the_two_products(rows: int, columns: int, rank: int) -> None:
    dy, h, b = torch.randn(rows, columns), torch.randn(rows, rank), torch.randn(columns, rank)
    # Sums of at most a hundred products in two orders.
    torch.testing.assert_close(
        gradients.product_gradients(dy, h, b, 0.3), gradients.reference(dy, h, b, 0.3), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize(("rows", "columns", "rank"), SIZES)
def test_in_bfloat16_a_master_gets_an_unrounded_gradient(rows: int, columns: int, rank: int) -> None:
    dy, h = torch.randn(rows, columns).bfloat16(), torch.randn(rows, rank).bfloat16()
    b = torch.randn(columns, rank)
    dh, db = gradients.product_gradients(dy, h, b, 0.3)
    assert dh.dtype == torch.bfloat16
    assert db.dtype == torch.float32
    torch.testing.assert_close(db, 0.3 * dy.float().T @ h.float(), rtol=1e-5, atol=2e-5)
    exact = 0.3 * (dy.double() @ b.bfloat16().double())
    torch.testing.assert_close(dh.double(), exact, rtol=2**-8, atol=1e-5)  # one rounding


def test_is_what_autograd_gives_for_the_epilogue() -> None:
    h, b = torch.randn(40, 7, requires_grad=True), torch.randn(70, 7, requires_grad=True)
    dy = torch.randn(40, 70)
    (1.7 * h @ b.T).backward(dy)
    dh, db = gradients.product_gradients(dy, h.detach(), b.detach(), 1.7)
    torch.testing.assert_close(dh, h.grad, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(db, b.grad, rtol=1e-5, atol=5e-5)


def test_same_inputs_same_bits() -> None:
    dy, h, b = torch.randn(70, 75), torch.randn(70, 5), torch.randn(75, 5)
    first, second = (gradients.product_gradients(dy, h, b, 0.3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_empty_batch_gives_zeros() -> None:
    dh, db = gradients.product_gradients(torch.ones(0, 6), torch.ones(0, 2), torch.ones(6, 2), 1.0)
    assert dh.shape == (0, 2)
    assert torch.equal(db, torch.zeros(6, 2))


def test_a_rank_too_large_for_the_registers_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 65 is above 64"):
        gradients.product_gradients(torch.ones(2, 6), torch.ones(2, 65), torch.ones(6, 65), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_added_in_float32(dtype: torch.dtype) -> None:
    parts = torch.randn(5, 13, 11)
    expected = partial_sums.reference(parts, 0.7, dtype)
    # In bfloat16 a sum that lies at a middle may round to either side.
    rtol = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(partial_sums.sum_parts(parts, 0.7, dtype), expected, rtol=rtol, atol=1e-6)
