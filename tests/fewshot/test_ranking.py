"""Ranking: each candidate is made once and measured once; the best comes first, of equals the earlier."""

from __future__ import annotations

import math

import pytest
import torch

from inlay.errors import ConfigError
from inlay.fewshot.searches.ranking import Quality, quality, rank


def test_the_best_first_and_equals_in_their_order() -> None:
    calls = list[tuple[str, object]]()
    accuracy = {"p": 0.5, "q": 0.75, "r": 0.75, "s": 0.75, "t": 0.25}
    likelihood = {"p": 0.0, "q": -2.0, "r": -1.0, "s": -2.0, "t": -0.1}

    def fit(candidate: str) -> str:
        calls.append(("fit", candidate))
        return candidate.upper()

    def dev(made: str) -> Quality:
        calls.append(("dev", made))
        return Quality(accuracy[made.lower()], likelihood[made.lower()])

    found = rank("pqrst", fit, dev)
    assert [one.candidate for one in found] == ["r", "q", "s", "p", "t"]
    assert [one.made for one in found] == ["R", "Q", "S", "P", "T"]
    assert calls == [(step, one) for c in "pqrst" for step, one in (("fit", c), ("dev", c.upper()))]
    with pytest.raises(ConfigError, match="no candidate"):
        rank([], fit, dev)


def test_quality_is_accuracy_then_likelihood() -> None:
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    found = quality(scores, torch.tensor([0, 1, 1]))
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.likelihood == pytest.approx(
        -(math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(3))) / 3, rel=1e-6
    )
    assert Quality(0.5, -9) > Quality(0.4, 0)
