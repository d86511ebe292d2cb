"""Candidates in the order of what comes of them: each is trained, measured on the development rows, and sorted.

Searches for templates and for label words end the same way (Gao et al. 2021, arXiv:2012.15723, section 5). Few
development rows tell candidates apart badly: on 32 rows many have the same accuracy, and the best of a hundred has it
partly by luck. So the log-likelihood decides between equals, and the score of the winner is no estimate of anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from inlay.errors import ConfigError

C = TypeVar("C")
F = TypeVar("F")


class Quality(NamedTuple):
    """What is larger is better; the accuracy first, then the likelihood."""

    accuracy: float
    likelihood: float
    """The mean log-probability of the right label."""


def quality(scores: Tensor, right: Tensor) -> Quality:
    """Of scores (rows, labels) and the labels' numbers (rows,)."""
    log_probs = scores.double().log_softmax(-1)
    hits = (scores.argmax(-1) == right).double().mean()
    return Quality(float(hits), float(log_probs.gather(-1, right[:, None]).mean()))


@dataclasses.dataclass(frozen=True)
class Ranked(Generic[C, F]):
    """A candidate, what came of it, and how good that is."""

    candidate: C
    made: F
    quality: Quality


def rank(candidates: Sequence[C], fit: Callable[[C], F], dev: Callable[[F], Quality]) -> list[Ranked[C, F]]:
    """All candidates, the best first; of equals the earlier. Raises ConfigError when there are none."""
    if not candidates:
        raise ConfigError("there is no candidate to rank")
    found = []
    for candidate in candidates:
        made = fit(candidate)
        found.append(Ranked(candidate, made, dev(made)))
    return sorted(found, key=lambda one: one.quality, reverse=True)
