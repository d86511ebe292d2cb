"""The k largest, exactly: against a stable sort, with ties, zeros and every count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inlay.errors import TrainingError
from inlay.kernels import exact_top_k


def by_sorting(tensors: list[Tensor], count: int) -> list[list[int]]:
    together = torch.cat([one.flatten() for one in tensors])
    chosen = together.sort(descending=True, stable=True).indices[:count]
    found, start = [], 0
    for one in tensors:
        inside = chosen[(chosen >= start) & (chosen < start + one.numel())] - start
        found.append(sorted(inside.tolist()))
        start += one.numel()
    return found


@pytest.mark.parametrize("count", [0, 1, 7, 60, 149, 150])
@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros", "wide"])
def test_it_is_what_a_stable_sort_gives(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_top_k, "CHUNK", 16)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(shape, generator=generator) for shape in ((5, 10), (4, 5, 4), (20,))]
    if kind == "ties":
        tensors = [(one * 4).floor() for one in tensors]
    if kind == "zeros":
        tensors = [torch.zeros_like(one) * -1 for one in tensors]
    if kind == "wide":  # down to the smallest numbers there are
        tensors = [torch.exp2(one * 270 - 149) for one in tensors]
    found = exact_top_k.largest(lambda: tensors, count)
    assert [one.tolist() for one in found] == by_sorting(tensors, count)
    assert sum(map(len, found)) == count


def test_what_is_no_number_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no finite number"):
        exact_top_k.largest(lambda: [torch.tensor([1.0, float("nan")])], 1)


def test_shares_are_proportional_and_sum_to_the_budget() -> None:
    assert exact_top_k.shares([10, 10, 10], 4) == [2, 1, 1]
    for budget in range(1, 48):
        found = exact_top_k.shares([1, 30, 7, 9], budget)
        assert sum(found) == budget
        assert all(abs(one - size * budget / 47) < 1 for one, size in zip(found, [1, 30, 7, 9], strict=True))


def test_groups_are_taken_while_they_fit() -> None:
    scores, sizes = torch.tensor([5.0, 9.0, 5.0, 1.0]), torch.tensor([4, 10, 3, 2])
    assert exact_top_k.packed(scores, sizes, 16).tolist() == [0, 1, 3]  # after 10 and 4, 3 no longer fits
    assert exact_top_k.packed(scores, sizes, 9).tolist() == [0, 2, 3]
    assert exact_top_k.packed(scores, sizes, 1).tolist() == []
