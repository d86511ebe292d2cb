"""S[ids] without S: against the matrix, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from inlay.kernels.sparse_rows import looked_up


@pytest.mark.parametrize("frozen", [None, 2])
@pytest.mark.parametrize("count", [1, 9, 44])
def test_it_is_the_matrix_looked_up(count: int, frozen: int | None) -> None:
    torch.manual_seed(0)
    rows, width = 11, 4
    flat = torch.randperm(rows * width)[:count].sort().values
    ids = torch.tensor([[2, 2, 0], [10, 5, 7]])
    values = torch.randn(count, requires_grad=True)
    matrix = torch.zeros(rows * width).index_add(0, flat, values).view(rows, width)
    expected, found = F.embedding(ids, matrix, frozen), looked_up(ids, values, flat, width, frozen)
    assert torch.equal(found, expected)
    weights = torch.randn(2, 3, width)
    (a,), (b,) = (torch.autograd.grad((one * weights).sum(), values, retain_graph=True) for one in (expected, found))
    torch.testing.assert_close(a, b)


def test_ids_without_entries_add_nothing() -> None:
    found = looked_up(torch.tensor([3, 4]), torch.ones(2), torch.tensor([0, 5]), 4)
    assert torch.equal(found, torch.zeros(2, 4))
