"""The ensemble of PET: for every pattern a few adapters, trained on the labelled rows, on one frozen base.

s(l | x) = Σ_p w_p s_p(l | x) / Σ_p w_p        w_p: the pattern's accuracy before any training, or 1

Schick & Schütze 2021, arXiv:2001.07676, section 3.3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from inlay.fewshot.learning.auxiliary import AuxiliaryMaskedLM
from inlay.fewshot.learning.objectives import Objective, as_targets
from inlay.fewshot.learning.seeds import derived
from inlay.fewshot.predictor import Predictor
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.prompts.soft_slots import with_slots
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.scorers.scorer import Scorer
from inlay.fewshot.stages import Stages

Weighing = Literal["zero_shot_train", "uniform"]


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of the ensemble: a pattern, and which repetition of it."""

    pattern: int
    repetition: int
    key: str
    """What its random numbers depend on, beside the seed: the template's text and the repetition, not its place."""

    @property
    def name(self) -> str:
        """Its stage's name."""
        return f"pattern-{self.pattern}-repetition-{self.repetition}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatternEnsemble:
    """Trains and asks the models of a problem's patterns. ConfigError for templates and words that do not fit."""

    problem: Problem
    repetitions: int = 3
    weighing: Weighing = "zero_shot_train"
    auxiliary: float = 1e-4
    """a, the share of masked language modelling in the loss."""
    ratio: int = 3
    """Unlabelled rows in a step for each labelled one."""

    def __post_init__(self) -> None:
        self.scorers  # noqa: B018 - what cannot be asked is an error now, not when its turn comes

    @functools.cached_property
    def scorers(self) -> list[Scorer]:
        """One for each pattern."""
        return [self.problem.mask_scorer(template) for template in self.problem.templates]

    @functools.cached_property
    def members(self) -> list[Member]:
        """Every pattern, every repetition."""
        return [
            Member(pattern, repetition, f"{template.source} #{repetition}")
            for pattern, template in enumerate(self.problem.templates)
            for repetition in range(self.repetitions)
        ]

    def weights(self, stages: Stages) -> tuple[float, ...]:
        """Each member's weight; none, which is the same for all, if "uniform", without labelled rows, or if all are 0.

        The share of labelled rows that the untrained base answers rightly in the member's pattern.
        """
        train = self.problem.train
        if self.weighing == "uniform" or not len(train):
            return ()

        def accuracies() -> Tensor:
            right = as_targets(train.labels, self.problem.labels)
            asked = self.untrained(train.rows)
            return torch.stack([(scores.argmax(-1) == right).double().mean() for scores in asked])

        found = stages.tensor("weights", accuracies, templates=[one.source for one in self.problem.templates])
        return tuple(found.repeat_interleave(self.repetitions).tolist()) if found.any() else ()

    def untrained(self, rows: Sequence[Row]) -> list[Tensor]:
        """What the base says in each pattern before any training, (rows, labels); soft slots are as they start."""
        base, found = self.problem.base, []
        for scorer in self.scorers:
            slots = with_slots((), scorer)
            adapted = (
                base.adapted(scorer.auto, slots, seed=self.problem.seed) if slots else base.holding(scorer.auto, None)
            )
            with adapted as model:
                found.append(scorer.scores(model, rows))
        return found

    def trained(self, stages: Stages, data: Sequence[Labelled], seed: int) -> list[Predictor]:
        """A fresh adapter for each member, on its own rows."""
        return [
            self.problem.trained(
                stages, member.name, self.scorers[member.pattern], (own.rows, own.labels),
                objective=self.objective(self.scorers[member.pattern]), seed=derived(seed, member.key),
            )
            for member, own in zip(self.members, data, strict=True)
        ]  # fmt: skip

    def objective(self, scorer: Scorer) -> Objective:
        """(1 − a) · the scorer's own objective + a · masked language modelling of unlabelled rows."""
        if not self.auxiliary:
            return scorer.objective()
        masked = AuxiliaryMaskedLM(self.problem.unlabelled, self.ratio)
        return (1 - self.auxiliary) * scorer.objective() + self.auxiliary * masked

    def scores(self, stages: Stages, predictors: Sequence[Predictor]) -> list[Tensor]:
        """What each member says about the unlabelled rows, (rows, labels)."""
        problem = self.problem
        return [
            stages.tensor(
                f"{member.name}-scores", functools.partial(predictor.scores, problem.base, problem.unlabelled)
            )
            for member, predictor in zip(self.members, predictors, strict=True)
        ]
