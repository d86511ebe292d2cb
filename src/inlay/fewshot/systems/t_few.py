"""T-Few: few (IA)³ vectors in a model that writes, trained to write the right answer and none of the wrong ones.

    L = L_LM + L_LN + L_UL                        choice_objectives.py
    s(l | x) = mean over the templates of beta(x, l),     beta = 1/|l| Σ_t log p(l_t | x, l_<t)

At each step each example is asked with a template drawn for it. The answer is the mean over all templates, where the
original draws one there too: the mean is no worse on average, and the same each time.
Adafactor at a fixed rate of 3e-3 (times each tensor's scale), up over 6% of the steps and down to 0 in a straight line,
1000 steps of 8 rows, no weight decay, gradients clipped to norm 1, no choosing by development rows.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.learning.choice_objectives import LengthNormalised, TargetNLL, Unlikelihood
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.problem import Problem, System
from inlay.fewshot.scorers.choice import ChoiceScorer
from inlay.fewshot.scorers.drawn import DrawnScorer
from inlay.fewshot.scorers.forms import asked
from inlay.fewshot.stages import Stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class TFew(System):
    """Three losses over the tokens of all choices, for models that write: T5-like ones as in the paper, or decoders."""

    kind: ClassVar[str] = "t-few"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv:2205.05638"
    peft: ClassVar[Sequence[Mapping[str, Any]]] = ({"kind": "ia3"},)
    recipe: ClassVar[Mapping[str, Any]] = {
        "steps": 1000, "batch_size": 8, "learning_rate": 3e-3, "warmup": 0.06, "weight_decay": 0.0,
        "optimizer": "adafactor",
    }  # fmt: skip

    length_norm: float = 1.0
    """By what power of its number of tokens a choice's log-probability is divided."""
    length_normalised: float = 1.0
    """Weight of L_LN; 0: without."""
    unlikelihood: float = 1.0
    """Weight of L_UL; 0: without."""
    eps: float = 0.01
    """What keeps L_UL finite where a wrong token is certain."""

    def __post_init__(self) -> None:
        for name in ("length_normalised", "unlikelihood"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: a weight of at least 0 is needed")
        if not self.eps > 0:
            raise ConfigError(f"eps={self.eps!r}: a number above 0 is needed")

    def _scorers(self, problem: Problem) -> list[ChoiceScorer]:
        made = [asked(problem, template, length_norm=self.length_norm) for template in problem.templates]
        choosing = [scorer for scorer in made if isinstance(scorer, ChoiceScorer)]
        if len(choosing) < len(made):
            raise ConfigError(
                f"t-few trains a model that writes its answers, and {problem.base.source} fills in masks: choose a "
                "decoder or a T5-like model, or --method prompt"
            )
        return choosing

    @override
    def check(self, problem: Problem) -> None:
        self._scorers(problem)

    @override
    def solve(self, problem: Problem, stages: Stages) -> Solution:
        scorers = self._scorers(problem)
        objective = (
            TargetNLL() + self.length_normalised * LengthNormalised() + self.unlikelihood * Unlikelihood(self.eps)
        )
        trained = problem.trained(stages, "choices", DrawnScorer.of(scorers), objective=objective)
        return Solution(predictors=[Predictor(scorer=scorer, adapter=trained.adapter) for scorer in scorers])
