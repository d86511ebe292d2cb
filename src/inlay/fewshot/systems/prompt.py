"""Prompt-based fine-tuning: each pattern's mask is the classifier, and the adapter learns to fill it in.

    softmax over labels of the verbalizer's words at the mask; cross-entropy; several patterns are averaged

Schick & Schütze 2021, arXiv:2001.07676; Gao et al. 2021, arXiv:2012.15723.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from typing_extensions import override

from inlay.fewshot.predictor import Solution
from inlay.fewshot.problem import Problem, System
from inlay.fewshot.scorers.forms import asked
from inlay.fewshot.stages import Stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt(System):
    """Ask, and train the answer. With `recipe.steps=0` the model answers as it is: zero-shot."""

    kind: ClassVar[str] = "prompt"
    paper: ClassVar[str] = "Schick & Schütze 2021, arXiv:2001.07676"

    @override
    def check(self, problem: Problem) -> None:
        for template in problem.templates:
            asked(problem, template)

    @override
    def solve(self, problem: Problem, stages: Stages) -> Solution:
        return Solution(
            predictors=[
                problem.trained(stages, f"pattern-{number}", asked(problem, template))
                for number, template in enumerate(problem.templates)
            ]
        )
