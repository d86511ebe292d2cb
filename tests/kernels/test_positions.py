"""The kernels for numbers at fixed positions against their plain formulas, and what the functions keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles.plain_formulas import gradients, kept, leaf, size
from torch import Tensor

from inlay.engine.linear import Linear
from inlay.kernels import positions as kernel

IN, OUT = 6, 5
SHAPE = (OUT, IN)
FLAT = torch.tensor([0, 5, 7, 8, 22, 29])  # rows 0, 1, 3 and 4; one without any


class Inner:
    """What a piece is given to call, for a linear or for a host that is none."""

    def __init__(self, weight: Tensor, bias: Tensor | None, plain: bool = True) -> None:
        self.weight, self.bias, self.plain = weight, bias, plain

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def linear(self) -> Linear | None:
        return Linear(self.weight, self.bias, self.weight.dtype) if self.plain else None


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("shape", [(1, IN), (2, 3, IN), (40, IN)])  # multiplied apart, and as one sum
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_the_plain_formula(shape: tuple[int, ...], dtype: torch.dtype, plain: bool) -> None:
    x, weight, bias, values = leaf(*shape, dtype=dtype), leaf(*SHAPE, dtype=dtype, grad=False), leaf(OUT), leaf(6)
    bias, values = (t.detach().to(dtype).requires_grad_() for t in (bias, values))
    found = kernel.changed(Inner(weight, bias, plain), x, values, kernel.places(FLAT, SHAPE))  # type: ignore[arg-type]
    expected = F.linear(x, weight + kernel.scattered(values, FLAT, SHAPE), bias)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **close)
    for one, other in zip(gradients(found, x, values, bias), gradients(expected, x, values, bias), strict=True):
        torch.testing.assert_close(one, other, **close)


def test_few_rows_form_no_matrix_and_many_keep_none() -> None:
    weight, bias, values = leaf(40, 50, grad=False), leaf(40, grad=False), leaf(30)
    where = kernel.places(torch.arange(3, 2000, 67), (40, 50))
    for count, function in ((20, "SparseProduct"), (100, "ChangedLinear")):
        x = leaf(count, 50)
        with kept(x, weight, bias) as saved:
            y = kernel.changed(Inner(weight, bias), x, values, where)  # type: ignore[arg-type]
        last = y.grad_fn if function == "ChangedLinear" else y.grad_fn.next_functions[1][0]  # type: ignore[union-attr]
        assert type(last).__name__ == f"{function}Backward"
        assert size(saved) == values.nbytes


def test_half_precision_adds_to_what_the_base_gave() -> None:
    weight, values = leaf(*SHAPE, dtype=torch.bfloat16, grad=False), leaf(6)
    x = leaf(40, IN, dtype=torch.bfloat16)
    found = kernel.changed(Inner(weight, None), x, values, kernel.places(FLAT, SHAPE))  # type: ignore[arg-type]
    exact = (x.float() @ kernel.scattered(values, FLAT, SHAPE).t()).bfloat16()
    assert torch.equal(found, F.linear(x, weight) + exact)
    dx, dvalues = gradients(found, x, values)
    assert (dx.dtype, dvalues.dtype) == (torch.bfloat16, torch.float32)


def test_values_of_one_place_add_up() -> None:
    found = kernel.scattered(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3, 3, 0]), (2, 2))
    assert found.tolist() == [[4, 0], [0, 3]]


def test_drawn_is_distinct_and_follows_its_seed() -> None:
    one, two = kernel.drawn(50, 60, 3), kernel.drawn(50, 60, 3)
    assert torch.equal(one, two)
    assert len(one.unique()) == 50
    assert not torch.equal(one, kernel.drawn(50, 60, 4))
    torch.manual_seed(0)
    assert not torch.equal(kernel.drawn(50, 60, None), kernel.drawn(50, 60, None))
