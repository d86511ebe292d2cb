"""An adapter trained with what the development rows choose: the recipe, of a grid, and the step at which to stop."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from inlay.errors import ConfigError
from inlay.fewshot.learning.best_step import BestStep
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.learning.objectives import as_targets
from inlay.fewshot.learning.seeds import derived
from inlay.fewshot.predictor import Predictor, mean_scores, sets_of
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.prompts.demonstrations import Demonstrations
from inlay.fewshot.scorers.scorer import Scorer
from inlay.fewshot.searches.ranking import Quality, quality, rank
from inlay.fewshot.stages import Stages
from inlay.train.settings import known_only


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of a grid of recipes; of no grid one that changes nothing. ConfigError for what is no recipe."""
    known_only(grid, [field.name for field in dataclasses.fields(Recipe)], "grid")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not points:
        raise ConfigError(f"grid={dict(grid)!r}: each setting needs at least one value")
    for point in points:
        Recipe(**point)
    return points


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Trains a problem's adapters, each as a stage."""

    problem: Problem
    stages: Stages
    points: Sequence[Mapping[str, Any]] = ({},)
    """Changes of the recipe to choose from."""
    checks: int = 10
    """How often a training asks the development rows; without any it goes to its last step."""

    @property
    def dev(self) -> Labelled:
        """The development rows. Raises ConfigError where there are none."""
        if self.problem.dev is None:
            raise ConfigError(
                "the development rows are to choose, and there are none: draw the rows with shots, and as many (or "
                "dev=N) are drawn to choose by; or leave search and grid out"
            )
        return self.problem.dev

    def trained(self, name: str, scorer: Scorer, demonstrations: Demonstrations | None = None) -> Predictor:
        """The predictor of the best recipe."""
        if len(self.points) == 1:
            return self._trained(name, scorer, demonstrations, self.points[0])
        ranked = rank(
            range(len(self.points)),
            lambda index: self._trained(f"{name}-point-{index}", scorer, demonstrations, self.points[index]),
            self.measured,
        )
        return ranked[0].made

    def measured(self, made: Predictor) -> Quality:
        """How well a trained predictor answers the development rows, as a stage beside its own."""
        assert made.adapter is not None
        name = f"{made.adapter.parent.relative_to(self.stages.folder).as_posix()}-dev"
        scores = self.stages.tensor(name, lambda: made.scores(self.problem.base, self.dev.rows))
        return quality(scores, as_targets(self.dev.labels, self.problem.labels))

    def _trained(
        self, name: str, scorer: Scorer, demonstrations: Demonstrations | None, point: Mapping[str, Any]
    ) -> Predictor:
        base, recipe = self.problem.base, dataclasses.replace(self.problem.recipe, **point)
        shown = () if demonstrations is None else demonstrations.for_queries()
        options: dict[str, Any] = {}
        if self.problem.dev is not None and recipe.steps:
            right = as_targets(self.dev.labels, scorer.labels)
            sets = functools.cache(lambda: sets_of(shown, base, self.dev.rows))
            options["each_step"] = BestStep(
                lambda: base.model(scorer.auto),
                lambda: quality(mean_scores(scorer, base.model(scorer.auto), self.dev.rows, sets()), right),
                recipe.steps, self.checks,
            )  # fmt: skip
        if demonstrations is not None:
            options["demonstrator"] = demonstrations.demonstrator(base)
        depends = {
            "demonstrations": None if demonstrations is None else demonstrations.settings(),
            "dev": None if self.problem.dev is None else derived(0, list(map(dict, self.dev.rows)), self.dev.labels),
            "checks": self.checks,
        }
        made = self.problem.trained(self.stages, name, scorer, recipe=recipe, depends=depends, **options)
        return dataclasses.replace(made, demonstrations=shown)
