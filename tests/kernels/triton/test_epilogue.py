"""y += s · h Bᵀ against torch, at sizes that no block divides."""

from __future__ import annotations

import pytest
import torch

from inlay.errors import ConfigError
from inlay.kernels.triton import epilogue

# float32: sums of at most a hundred products in two orders. bfloat16: both round the float32 sum once (2⁻⁹ of it),
# so they differ by one step at most where the sums fall on two sides of a middle.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-4}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(37, 70, 5), (1, 33, 1), (16, 32, 16), (20, 40, 100)])
def test_adds_the_product_in_place(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    y, h = torch.randn(rows, columns).to(dtype), torch.randn(rows, rank).to(dtype)
    b = torch.randn(columns, rank)  # a float32 master, whatever the dtype of y
    expected = epilogue.reference(y.clone(), h, b, 0.3)
    assert epilogue.add_product_(y, h, b, 0.3) is y
    torch.testing.assert_close(y, expected, **CLOSE[dtype])


def test_serves_the_gradient_of_the_input_with_a_transposed() -> None:
    dx, dh, a = torch.randn(19, 45), torch.randn(19, 6), torch.randn(6, 45)
    expected = dx + dh @ a
    torch.testing.assert_close(epilogue.add_product_(dx, dh, a.T, 1.0), expected, **CLOSE[torch.float32])


def test_leaves_what_lies_beside_a_view() -> None:
    whole = torch.randn(21, 50)
    before, h, b = whole.clone(), torch.randn(21, 4), torch.randn(30, 4)
    epilogue.add_product_(whole[:, 10:40], h, b, 1.0)
    torch.testing.assert_close(whole[:, 10:40], before[:, 10:40] + h @ b.T, **CLOSE[torch.float32])
    assert torch.equal(whole[:, :10], before[:, :10])
    assert torch.equal(whole[:, 40:], before[:, 40:])


def test_nothing_to_do() -> None:
    y = torch.randn(3, 4)
    assert torch.equal(epilogue.add_product_(y.clone(), torch.ones(3, 0), torch.ones(4, 0), 1.0), y)
    assert epilogue.add_product_(torch.ones(0, 4), torch.ones(0, 2), torch.ones(4, 2), 1.0).shape == (0, 4)


@pytest.mark.parametrize(
    ("y", "h", "b", "message"),
    [
        (torch.ones(3, 4), torch.ones(2, 5), torch.ones(4, 5), r"h has the shape \(2, 5\); give one of \(3, any\)"),
        (torch.ones(3, 4), torch.ones(3, 5), torch.ones(5, 4), r"B has the shape \(5, 4\); give one of \(4, 5\)"),
        (torch.ones(4, 3).T, torch.ones(3, 5), torch.ones(4, 5), r"y has strides \(1, 3\).*contiguous"),
        (torch.ones(3, 4), torch.ones(3, 5).half(), torch.ones(4, 5), "h is torch.float16 and the rest torch.float32"),
        (torch.ones(3, 4).double(), torch.ones(3, 5), torch.ones(4, 5), "y is torch.float64"),
        (torch.ones(3, 4), torch.ones(3, 5), torch.ones(4, 5, device="meta"), "B is on meta and the rest on cpu"),
    ],
)
def test_says_which_operand_does_not_fit(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        epilogue.add_product_(y, h, b, 1.0)
