"""Labels from models: what an ensemble, or some of its models, says about unlabelled rows.

PET keeps the probabilities; iPET draws rows with hard labels, so many of each label, for the next generation of models
(Schick & Schütze 2021, arXiv:2001.07676, sections 3.3 and 3.4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.errors import ConfigError, DataError
from inlay.fewshot.learning.seeds import derived
from inlay.fewshot.problem import Labelled
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.scorers.ensembles import Space, combined


@dataclasses.dataclass(frozen=True)
class Annotated:
    """Rows by their numbers, and the number of the label given to each."""

    rows: tuple[int, ...]
    labels: tuple[int, ...]

    def of(self, rows: Sequence[Row], labels: Sequence[str]) -> Labelled:
        """The rows themselves, with the names of their labels."""
        return Labelled(rows=[rows[number] for number in self.rows], labels=[labels[number] for number in self.labels])

    def to_tensor(self) -> Tensor:
        """(n, 2): row, label."""
        return torch.tensor([self.rows, self.labels], dtype=torch.int64).T

    @classmethod
    def from_tensor(cls, pairs: Tensor) -> Annotated:
        """Read `to_tensor`'s result."""
        rows, labels = pairs.T.tolist()
        return cls(tuple(rows), tuple(labels))


def soft_labels(scores: Sequence[Tensor], weights: Sequence[float] | None = None, space: Space = "logit") -> Tensor:
    """softmax(Σ_p w_p s_p / Σ_p w_p): the ensemble's probabilities (rows, labels) out of each model's scores.

    Weights that are all 0 tell the models apart as little as none: then all count the same.
    """
    return combined(scores, weights if weights is not None and any(weights) else None, space).softmax(-1)


def teachers(names: Sequence[str], own: int, share: float, seed: int) -> list[int]:
    """Which models teach model `own`: round(share · (n − 1)) of the others, at least one, drawn at random.

    The draw depends on the models' names, not on their order. Raises ConfigError when there is no other model.
    """
    others = sorted((index for index in range(len(names)) if index != own), key=lambda index: names[index])
    if not others:
        raise ConfigError(
            "models that teach each other must be two at least: give another template, or more repetitions"
        )
    generator = torch.Generator().manual_seed(derived(seed, "teachers", names[own]))
    count = max(1, round(share * len(others)))
    return [others[place] for place in torch.randperm(len(others), generator=generator)[:count].tolist()]


def drawn(probabilities: Tensor, counts: Sequence[int], seed: int, labels: Sequence[str] = ()) -> Annotated:
    """For each label so many rows of those whose likeliest label it is, without replacement, P(x) ∝ max_l p(l | x).

    `probabilities` (rows, labels); `labels` are names for messages. Raises DataError when a label is the likeliest of
    fewer rows than are to be drawn.
    """
    confidence, likeliest = probabilities.max(-1)
    generator = torch.Generator().manual_seed(seed)
    rows: list[int] = []
    given: list[int] = []
    for label, count in enumerate(counts):
        pool = (likeliest == label).nonzero()[:, 0]
        if len(pool) < count:
            name = repr(labels[label]) if labels else f"number {label}"
            raise DataError(
                f"{count} rows of the label {name} are to be drawn, and the models give it to {len(pool)} of "
                f"{len(probabilities)} unlabelled rows: give more of them, grow by less, or train fewer generations"
            )
        if count:
            chosen = torch.multinomial(confidence[pool], count, replacement=False, generator=generator)
            rows += pool[chosen].tolist()
            given += [label] * count
    return Annotated(tuple(rows), tuple(given))


def most_likely(probabilities: Tensor, count: int) -> Annotated:
    """For each label the `count` rows with its highest probability, even where another label's is higher still.

    `probabilities` (rows, labels). A row may be among several labels' likeliest. Raises DataError when there are fewer
    rows.
    """
    if len(probabilities) < count:
        raise DataError(
            f"{count} rows of each label are to be chosen, and there are {len(probabilities)} unlabelled rows: give "
            "more of them, or choose fewer"
        )
    best = probabilities.argsort(dim=0, descending=True, stable=True)[:count]
    numbers = torch.arange(probabilities.shape[1]).repeat_interleave(count)
    return Annotated(tuple(best.T.flatten().tolist()), tuple(numbers.tolist()))
