"""Standard fine-tuning: a new classification head on the model, trained with the adapter; the baseline of all others.

softmax(head(body(x)))      Devlin et al. 2019, arXiv:1810.04805
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from typing_extensions import override

from inlay.fewshot.predictor import Solution
from inlay.fewshot.problem import Problem, System
from inlay.fewshot.stages import Stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standard(System):
    """A head, and nothing of the pretrained model's own words."""

    kind: ClassVar[str] = "standard"
    paper: ClassVar[str] = "Devlin et al. 2019, arXiv:1810.04805"
    asks: ClassVar[bool] = False

    @override
    def solve(self, problem: Problem, stages: Stages) -> Solution:
        return Solution(predictors=[problem.trained(stages, "classifier", problem.head_scorer())])
