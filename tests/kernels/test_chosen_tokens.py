"""The first and last real tokens, against loops over texts."""

from __future__ import annotations

import pytest
import torch

from inlay.kernels.chosen_tokens import at, changed, ends

REAL = torch.tensor(
    [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
).bool()


@pytest.mark.parametrize(("first", "last"), [(1, 1), (2, 2), (3, 4), (0, 2), (2, 0), (9, 9)])
def test_ends_are_those_of_a_loop(first: int, last: int) -> None:
    begin, end = ends(REAL, first, last)
    for row, real in enumerate(REAL):
        places = real.nonzero().flatten().tolist()
        head = places[:first]
        tail = [place for place in places[-last:] if place not in head] if last else []
        assert begin.places[row][begin.there[row]].tolist() == head
        assert sorted(end.places[row][end.there[row]].tolist()) == tail


def test_only_the_chosen_change() -> None:
    h = torch.randn(5, 6, 3, dtype=torch.float64, requires_grad=True)
    begin, end = ends(REAL, 2, 2)
    found = changed(h, begin, at(h, begin) * 2)
    for row, real in enumerate(REAL):
        for place in range(6):
            expected = 3 * h[row, place] if place in real.nonzero().flatten()[:2] else h[row, place]
            assert torch.equal(found[row, place], expected)
    assert torch.autograd.gradcheck(lambda h: changed(h, end, at(h, end) ** 2), (h,))
