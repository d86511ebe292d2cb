"""Balanced random indices: how often each occurs, and that the seed alone decides where."""

from __future__ import annotations

import pytest
import torch

from inlay.kernels.balanced import balanced


@pytest.mark.parametrize(("count", "length"), [(0, 3), (2, 5), (5, 5), (12, 5), (1000, 7)])
def test_each_as_often_as_any_other(count: int, length: int) -> None:
    found = balanced(count, length, 42)
    assert found.dtype == torch.long
    assert found.numel() == count
    often = torch.bincount(found, minlength=length)
    assert often.numel() == length
    assert set(often.tolist()) <= {count // length, -(-count // length)}


def test_the_seed_decides() -> None:
    assert torch.equal(balanced(50, 7, 1), balanced(50, 7, 1))
    assert not torch.equal(balanced(50, 7, 1), balanced(50, 7, 2))
    assert not torch.equal(balanced(50, 7, 1), balanced(50, 7, 1).sort().values)
