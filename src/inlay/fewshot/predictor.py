"""What a few-shot run leaves: one or several ways of asking a model, and how their answers become one.

scores(x) = Σ_p w_p s_p(x) / Σ_p w_p        of logits, or of probabilities
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from inlay.errors import CheckpointError, ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.prompts.demonstrations import Demonstrations
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.scorers.ensembles import Space, combined
from inlay.fewshot.scorers.kinds import scorer_from_dict
from inlay.fewshot.scorers.scorer import Demonstration, Scorer

Shown = Sequence[Sequence[Demonstration]]


def sets_of(demonstrations: Shown | Demonstrations, base: Base, rows: Sequence[Row]) -> Sequence[Shown]:
    """For each set the demonstrations of each row; one set of none where nothing is shown."""
    if isinstance(demonstrations, Demonstrations):
        return demonstrations.shown(base, rows)
    return [[shown] * len(rows) for shown in demonstrations or [()]]


def mean_scores(scorer: Scorer, model: PreTrainedModel, rows: Sequence[Row], sets: Sequence[Shown]) -> Tensor:
    """The mean over `sets_of` demonstrations of what the model says as it stands, (rows, labels)."""
    return torch.stack([scorer.scores(model, rows, demonstrations=shown) for shown in sets]).mean(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
    """One way of asking: a scorer, the adapter that the model holds meanwhile, and what it is shown."""

    scorer: Scorer
    adapter: Path | None = None
    """The folder of a saved adapter; None: the base as it is."""
    demonstrations: Shown | Demonstrations = ()
    """Sets of demonstrations: the model is asked with each, and the scores are averaged. None: it is shown nothing.
    `Demonstrations`: what draws sets for each row, where they depend on it."""
    offset: tuple[float, ...] | None = None
    """What calibration takes off each label's log-probability (`scorers/calibration.py`)."""

    def __post_init__(self) -> None:
        if self.adapter is None and self.scorer.template.soft:
            raise ConfigError(
                f"the template {self.scorer.template.source!r} has soft slots, and the base has no vectors for them: "
                "ask with an adapter that was trained on this template, or write words in their place"
            )

    def scores(self, base: Base, rows: Sequence[Row], *, batch_size: int = 64) -> Tensor:
        """The scores (rows, labels) of float32."""
        scores = torch.stack(self.each_set(base, rows, batch_size=batch_size)).mean(0)
        return scores if self.offset is None else scores.log_softmax(-1) - torch.tensor(self.offset)

    def each_set(self, base: Base, rows: Sequence[Row], *, batch_size: int = 64) -> list[Tensor]:
        """The scores (rows, labels) with each set of demonstrations, without the offset."""
        sets = self.shown(base, rows)
        with self.holding(base) as model:
            return [self.scorer.scores(model, rows, demonstrations=shown, batch_size=batch_size) for shown in sets]

    def holding(self, base: Base) -> AbstractContextManager[PreTrainedModel]:
        """The model with the adapter in it."""
        return base.holding(self.scorer.auto, self.adapter, len(self.scorer.labels))

    def shown(self, base: Base, rows: Sequence[Row]) -> Sequence[Shown]:
        """For each set the demonstrations of each row; one set of none where nothing is shown."""
        return sets_of(self.demonstrations, base, rows)

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """As JSON can hold it; the adapter by its path in `folder`. Raises CheckpointError when it lies elsewhere."""
        if self.adapter is not None and not self.adapter.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"the adapter {self.adapter} is not in {folder}: save it there, beside what names it")
        adapter = None if self.adapter is None else self.adapter.resolve().relative_to(folder.resolve()).as_posix()
        return {
            "scorer": self.scorer.to_dict(),
            "adapter": adapter,
            "demonstrations": self.demonstrations.to_dict()
            if isinstance(self.demonstrations, Demonstrations)
            else [[[dict(row), label] for row, label in shown] for shown in self.demonstrations],
            "offset": None if self.offset is None else list(self.offset),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], folder: Path, base: Base) -> Predictor:
        """Read `to_dict`'s result. Raises CheckpointError when the adapter's folder is gone."""
        adapter = None if fields["adapter"] is None else folder / fields["adapter"]
        if adapter is not None and not adapter.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder} names an adapter outside itself: {fields['adapter']!r}")
        if adapter is not None and not adapter.is_dir():
            raise CheckpointError(f"{folder} is not whole: the adapter {adapter} is missing")
        demonstrations = fields["demonstrations"]
        return cls(
            scorer=scorer_from_dict(fields["scorer"], base.tokenizer),
            adapter=adapter,
            demonstrations=Demonstrations.from_dict(demonstrations)
            if isinstance(demonstrations, Mapping)
            else [[(row, label) for row, label in shown] for shown in demonstrations],
            offset=None if fields["offset"] is None else tuple(fields["offset"]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solution:
    """The predictors of a solved problem, and the weight of each."""

    predictors: Sequence[Predictor]
    weights: Sequence[float] = ()
    """One for each; none: all the same."""
    space: Space = "logit"
    """What is averaged: logits, or probabilities."""

    def __post_init__(self) -> None:
        if not self.predictors:
            raise ConfigError("a solution needs at least one predictor")

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the scores."""
        return self.predictors[0].scorer.labels

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return tuple(dict.fromkeys(column for p in self.predictors for column in p.scorer.template.columns))

    def scores(
        self,
        base: Base,
        rows: Sequence[Row],
        *,
        batch_size: int = 64,
        each: Callable[[int, int], None] = lambda done, of: None,
    ) -> Tensor:
        """The combined scores (rows, labels); `each` is told after every predictor."""
        found = []
        for number, predictor in enumerate(self.predictors):
            found.append(predictor.scores(base, rows, batch_size=batch_size))
            each(number + 1, len(self.predictors))
        return combined(found, self.weights or None, self.space)

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """As JSON can hold it; adapters by their paths in `folder`."""
        return {
            "predictors": [predictor.to_dict(folder) for predictor in self.predictors],
            "weights": list(self.weights),
            "space": self.space,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], folder: Path, base: Base) -> Solution:
        """Read `to_dict`'s result."""
        return cls(
            predictors=[Predictor.from_dict(entry, folder, base) for entry in fields["predictors"]],
            weights=tuple(fields["weights"]),
            space=fields["space"],
        )
