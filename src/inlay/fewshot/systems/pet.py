"""PET: several patterns teach a classifier, by way of unlabelled rows.

    1  for each pattern p, `repetitions` adapters:   (1 − a) CE(softmax s_p, y) + a MLM,   a = 1e-4
    2  for each unlabelled row:                      q = softmax(Σ_p w_p s_p / Σ_p w_p)
    3  a classification head learns q:               T² KL(q^(1/T) ‖ softmax(z / T)),   T = 2

w_p is the pattern's accuracy on the labelled rows before anything is trained, or 1. Step 3 reads unlabelled rows only.
With {mask*} in a pattern, step 1 has the hinge of the scorer that fills masks one after another in place of CE.

Schick & Schütze 2021, "Exploiting Cloze Questions for Few Shot Text Classification and Natural Language Inference",
arXiv:2001.07676.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.learning.annotation import soft_labels
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.learning.objectives import Distillation
from inlay.fewshot.learning.pattern_ensemble import PatternEnsemble, Weighing
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.problem import Problem, System
from inlay.fewshot.stages import Stages
from inlay.train.settings import known_only

FINAL = {"steps": 1000, "batch_size": 16}
"""The classifier's recipe where nothing is said: it has many rows, and starts with a new head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PET(System):
    """Pattern-exploiting training. Raises ConfigError where rows are missing that it learns from."""

    kind: ClassVar[str] = "pet"
    paper: ClassVar[str] = "Schick & Schütze 2021, arXiv:2001.07676"

    repetitions: int = 3
    """Adapters for each pattern, from different seeds."""
    weights: Weighing = "zero_shot_train"
    """What a pattern's answer weighs: its accuracy on the labelled rows before training, or the same."""
    auxiliary: float = 1e-4
    """a, the share of masked language modelling in the loss; 0: none."""
    ratio: int = 3
    """Unlabelled rows in a step for each labelled one."""
    distil: bool = True
    """Whether a classifier learns what the ensemble says; if not, the ensemble itself answers."""
    temperature: float = 2.0
    """T, at which the classifier learns."""
    final: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What its recipe has otherwise than the adapters': by default steps 1000, batch_size 16."""

    def __post_init__(self) -> None:
        for name in ("repetitions", "ratio"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}: a whole number of at least 1 is needed")
        if self.weights not in ("zero_shot_train", "uniform"):
            raise ConfigError(f"weights={self.weights!r}: either zero_shot_train or uniform")
        if not 0 <= self.auxiliary < 1:
            raise ConfigError(f"auxiliary={self.auxiliary!r}: a share of the loss, from 0 to less than 1, is needed")
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature!r}: a number above 0 is needed")
        known_only(self.final, [field.name for field in dataclasses.fields(Recipe)], "final")
        object.__setattr__(self, "final", {**FINAL, **self.final})
        Recipe(**self.final)  # numbers that cannot be meant are an error now

    @override
    def check(self, problem: Problem) -> None:
        super().check(problem)
        if self.distil:
            problem.head_scorer()

    @override
    def solve(self, problem: Problem, stages: Stages) -> Solution:
        self.check(problem)
        patterns = self.patterns(problem)
        if not len(problem.train):
            raise ConfigError("pet learns from labelled rows, and there are none: ipet can start without any")
        weights = patterns.weights(stages)
        predictors = patterns.trained(stages, [problem.train] * len(patterns.members), problem.seed)
        return self.answer(patterns, stages, predictors, weights)

    def patterns(self, problem: Problem) -> PatternEnsemble:
        """The models to train. Raises ConfigError where rows are missing that they, or the classifier, read."""
        if (self.distil or self.auxiliary) and not problem.unlabelled:
            raise ConfigError(
                f"{self.kind} learns from unlabelled rows, and there are none: give --unlabeled FILE, or leave out "
                "what reads them with distil=False and auxiliary=0"
            )
        return PatternEnsemble(
            problem=problem,
            repetitions=self.repetitions,
            weighing=self.weights,
            auxiliary=self.auxiliary,
            ratio=self.ratio,
        )

    def answer(
        self, patterns: PatternEnsemble, stages: Stages, predictors: Sequence[Predictor], weights: Sequence[float]
    ) -> Solution:
        """The ensemble, or the classifier that it teaches."""
        if not self.distil:
            return Solution(predictors=predictors, weights=weights)
        problem = patterns.problem
        taught = soft_labels(patterns.scores(stages, predictors), weights)
        classifier = problem.trained(
            stages, "classifier", problem.head_scorer(), (problem.unlabelled, taught),
            objective=Distillation(self.temperature), recipe=dataclasses.replace(problem.recipe, **self.final),
        )  # fmt: skip
        return Solution(predictors=[classifier])
