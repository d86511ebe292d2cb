"""Mixed batches: every row with its own adapter, against the formula row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inlay.errors import ConfigError
from inlay.kernels.triton import grouped

IN, OUT, RANK = 50, 70, 5
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 5e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3}}

INDEX = {
    "mixed": [2, -1, 0, 2, 2, 1, -1, 0, 2, 4],
    "sorted": [0, 0, 0, 1, 1, 3],
    "none": [-1, -1, -1],
    "one for all": [1] * 40,
    "a row each": [4, 3, 2, 1, 0],
    "more than a block": ([0, 3, -1, 3, 3] * 15),
}


def factors(adapters: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(adapters, RANK, IN), torch.randn(adapters, OUT, RANK), torch.rand(adapters) + 0.5


def row_by_row(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, index: Tensor) -> Tensor:
    rows = [
        row if k < 0 else row + scales[k] * b[k] @ (a[k] @ entry)
        for row, entry, k in zip(y, x, index.tolist(), strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INDEX)
def test_equals_the_formula_row_by_row(name: str, dtype: torch.dtype) -> None:
    index = torch.tensor(INDEX[name])
    a, b, scales = factors()
    x, y = torch.randn(len(index), IN).to(dtype), torch.randn(len(index), OUT).to(dtype)
    expected = grouped.reference(y.clone(), x, a, b, scales, index)
    if dtype == torch.float32:
        torch.testing.assert_close(expected, row_by_row(y, x, a, b, scales, index), **CLOSE[dtype])
    idle, before = index < 0, y.clone()
    groups = grouped.group_rows(index, len(a), rows=16)
    assert grouped.add_grouped_product_(y, x, a, b, scales, groups) is y
    torch.testing.assert_close(y, expected, **CLOSE[dtype])
    assert torch.equal(y[idle], before[idle])


def test_gradient_of_the_input_is_the_same_product_of_transposed_factors() -> None:
    index = torch.tensor(INDEX["mixed"], dtype=torch.int32)
    a, b, scales = factors()
    x = torch.randn(len(index), IN, requires_grad=True)
    dy = torch.randn(len(index), OUT)
    row_by_row(torch.zeros_like(dy), x, a, b, scales, index).backward(dy)
    dx = torch.zeros(len(index), IN)
    grouped.add_grouped_product_(dx, dy, b.mT, a.mT, scales, grouped.group_rows(index, len(a)))
    torch.testing.assert_close(dx, x.grad, **CLOSE[torch.float32])


@pytest.mark.parametrize("name", INDEX)
def test_every_row_with_an_adapter_is_in_one_block_of_it(name: str) -> None:
    index = torch.tensor(INDEX[name])
    groups = grouped.group_rows(index, 5, rows=16)
    seen: list[int] = []
    for adapter, start, stop in zip(groups.adapter.tolist(), groups.start.tolist(), groups.stop.tolist(), strict=True):
        assert 0 <= stop - start <= 16
        rows = groups.order[start:stop].tolist()
        assert all(index[row] == adapter for row in rows)
        seen += rows
    assert sorted(seen) == (index >= 0).nonzero().flatten().tolist()


def test_empty_batch() -> None:
    a, b, scales = factors()
    groups = grouped.group_rows(torch.zeros(0, dtype=torch.int64), 5)
    assert grouped.add_grouped_product_(torch.ones(0, OUT), torch.ones(0, IN), a, b, scales, groups).shape == (0, OUT)


def test_operands_that_do_not_fit_are_refused() -> None:
    a, b, scales = factors()
    groups = grouped.group_rows(torch.tensor([0, 1]), 5)
    x, y = torch.ones(2, IN), torch.ones(2, OUT)
    with pytest.raises(ConfigError, match=r"A has the shape \(4, 5, 50\); give \(5, 5, 50\)"):
        grouped.add_grouped_product_(y, x, a[:4], b, scales, groups)
    with pytest.raises(ConfigError, match=r"x has the shape \(1, 50\)"):
        grouped.add_grouped_product_(y, x[:1], a, b, scales, groups)
    with pytest.raises(ConfigError, match=r"scales is torch.float64"):
        grouped.add_grouped_product_(y, x, a, b, scales.double(), groups)
    with pytest.raises(ConfigError, match="blocks of 20 rows"):
        grouped.group_rows(torch.tensor([0, 1]), 5, rows=20)
    with pytest.raises(ConfigError, match=r"index is torch.float32"):
        grouped.group_rows(torch.tensor([0.0]), 5)
