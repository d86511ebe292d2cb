"""iPET: generations of PET's models, each taught by the one before on more and more rows.

    generation 1 trains on the N labelled rows; for generation g + 1 each model i gets N dᵍ rows,
        the labelled ones, and of every label N_l (dᵍ − 1) unlabelled ones, drawn without replacement where
        q = softmax(Σ_t w_t s_t / Σ_t w_t)     t: round(λ · (n − 1)) of the other n − 1 models, drawn at random
        has its maximum at l, with probability proportional to that maximum
    the last generation teaches a classifier, as in PET

d = 5, λ = 1/4, 3 generations. The labels drawn are hard, and every generation starts from the pretrained weights.
Without labelled rows, generation 1 trains for every label on the `start` rows that the untrained patterns, averaged,
give the highest probability of it; then N_l = start, and all N dᵍ rows are drawn.

Schick & Schütze 2021, arXiv:2001.07676, section 3.4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.learning.annotation import Annotated, drawn, most_likely, soft_labels, teachers
from inlay.fewshot.learning.pattern_ensemble import PatternEnsemble
from inlay.fewshot.learning.seeds import derived
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.stages import Stages
from inlay.fewshot.systems.pet import PET


@dataclasses.dataclass(frozen=True, kw_only=True)
class IPET(PET):
    """PET in generations. Raises ConfigError where there are too few unlabelled rows or models for them."""

    kind: ClassVar[str] = "ipet"

    generations: int = 3
    """How often the models are trained."""
    grow: float = 5.0
    """d: how many times as many rows a generation has as the one before."""
    share: float = 0.25
    """λ: the share of the other models that teach a model."""
    start: int = 100
    """Rows of each label that generation 1 trains on where there are no labelled rows."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("generations", "start"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}: a whole number of at least 1 is needed")
        if not self.grow >= 1:
            raise ConfigError(f"grow={self.grow!r}: a factor of at least 1 is needed")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share!r}: a share of the other models, above 0 and up to 1, is needed")

    @override
    def solve(self, problem: Problem, stages: Stages) -> Solution:
        self.check(problem)
        patterns = self.patterns(problem)
        weights = patterns.weights(stages)
        data = [problem.train if len(problem.train) else self.started(patterns, stages)] * len(patterns.members)
        for generation in range(1, self.generations + 1):
            part, seed = stages.within(f"generation-{generation}"), derived(problem.seed, generation)
            predictors = patterns.trained(part, data, seed)
            if generation < self.generations:
                counts = self.counts(problem, generation)
                data = self.grown(patterns, part, predictors, weights, counts, seed)
        return self.answer(patterns, part, predictors, weights)

    @override
    def check(self, problem: Problem) -> None:
        super().check(problem)
        if self.generations > 1 and len(problem.templates) * self.repetitions < 2:
            raise ConfigError(
                "ipet's models teach each other, and there is one: give another template, or repetitions=3"
            )

    @override
    def patterns(self, problem: Problem) -> PatternEnsemble:
        made = super().patterns(problem)
        grown = sum(self.counts(problem, self.generations - 1)) if self.generations > 1 else 0
        needed = max(grown, 0 if len(problem.train) else self.start)
        if len(problem.unlabelled) < needed:
            raise ConfigError(
                f"ipet's {self.generations} generations that grow {self.grow:g} times each need {needed} unlabelled "
                f"rows, and there are {len(problem.unlabelled)}: give more (a run uses at most its unlabelled_rows of "
                f"them: --set unlabelled_rows={needed}), or lower method.grow, method.generations or method.start"
            )
        return made

    def counts(self, problem: Problem, generation: int) -> list[int]:
        """How many rows of each label are drawn behind a generation for the next."""
        labelled = [list(problem.train.labels).count(label) for label in problem.labels]
        first = labelled if len(problem.train) else [self.start] * len(labelled)
        factor = self.grow**generation
        return [round(base * factor) - true for base, true in zip(first, labelled, strict=True)]

    def started(self, patterns: PatternEnsemble, stages: Stages) -> Labelled:
        """Rows for generation 1, where none are labelled."""
        problem = patterns.problem

        def chosen() -> Tensor:
            return most_likely(soft_labels(patterns.untrained(problem.unlabelled)), self.start).to_tensor()

        found = stages.tensor("start", chosen, start=self.start)
        return Annotated.from_tensor(found).of(problem.unlabelled, problem.labels)

    def grown(
        self,
        patterns: PatternEnsemble,
        stages: Stages,
        predictors: Sequence[Predictor],
        weights: Sequence[float],
        counts: Sequence[int],
        seed: int,
    ) -> list[Labelled]:
        """Each member's rows for the next generation."""
        problem, keys = patterns.problem, [member.key for member in patterns.members]
        scores = patterns.scores(stages, predictors)

        def taught(own: int) -> Tensor:
            chosen = teachers(keys, own, self.share, seed)
            said = soft_labels([scores[one] for one in chosen], [weights[one] for one in chosen] if weights else None)
            return drawn(said, counts, derived(seed, "rows", keys[own]), problem.labels).to_tensor()

        data = []
        for own, member in enumerate(patterns.members):
            found = stages.tensor(
                f"{member.name}-rows", functools.partial(taught, own), share=self.share, counts=counts
            )
            data.append(problem.train + Annotated.from_tensor(found).of(problem.unlabelled, problem.labels))
        return data
