"""LiST: self-training of adapters on soft pseudo-labels, each weighed by what it does for the labelled rows.

    teacher     prompt-based training of the adapter on the labelled rows
    6 times     p = softmax(the teacher's scores)^(1/T) of the unlabelled rows, normalised
                a fresh student:  Σ_i w_i KL(p_i ‖ softmax(s_i)),   w uniform for 60% of the steps, then meta weights
                the student goes on with the labelled rows, and is the next teacher

Adapters are linear (x + W_up W_down x, width 128) behind attention and feed-forward network; of the head all but the
vocabulary's matrix is trained too, at a rate of its own: what suits an adapter destroys pretrained weights. The row
weights w are `meta_weights.py`'s.

Wang et al. 2021, "LiST: Lite Prompted Self-training Makes Parameter-Efficient Few-shot Learners", arXiv:2110.06274.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.learning.language_head import language_head
from inlay.fewshot.learning.meta_weights import MetaWeighted
from inlay.fewshot.learning.seeds import derived
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.problem import Problem, System
from inlay.fewshot.scorers.scorer import Scorer
from inlay.fewshot.stages import Stages
from inlay.train.settings import known_only

STUDENT = {"steps": 1000, "batch_size": 16}
"""The students' recipe where nothing is said: they have many rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiST(System):
    """Lite self-training. Raises ConfigError where unlabelled rows are missing."""

    kind: ClassVar[str] = "list"
    paper: ClassVar[str] = "Wang et al. 2021, arXiv:2110.06274"
    peft: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"kind": "adapter", "placement": "houlsby", "bottleneck": 128, "activation": "identity", "train_norms": False},
    )
    recipe: ClassVar[Mapping[str, Any]] = {"steps": 400, "batch_size": 4}

    sessions: int = 6
    """How often a student learns from a teacher."""
    student: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What a student's recipe has otherwise than the teacher's: by default steps 1000, batch_size 16."""
    epochs: int = 50
    """How often each student then sees the labelled rows."""
    warmup: float = 0.6
    """The share of a student's steps in which all confident rows count the same."""
    threshold: float = 0.0
    """What the largest probability of a row has to be above, to be confident."""
    labelled: int = 4
    """Labelled rows that the weights of a step are measured on."""
    reweight: bool = True
    """Meta weights after the warm-up; if not, the warm-up lasts for all steps."""
    temperature: float = 1.0
    """T: below 1 the pseudo-labels are sharper than the teacher's probabilities."""
    head: bool = True
    """Whether the language model's head, but for the vocabulary's matrix, is trained too."""
    head_rate: float = 1e-4
    """The head's own peak rate; the recipe's is the adapter's."""

    def __post_init__(self) -> None:
        for name, low in (("sessions", 1), ("epochs", 0), ("labelled", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name}={value!r}: a whole number of at least {low} is needed")
        for name in ("warmup", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: a share from 0 to 1 is needed")
        for name in ("temperature", "head_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: a number above 0 is needed")
        known_only(self.student, [field.name for field in dataclasses.fields(Recipe)], "student")
        object.__setattr__(self, "student", {**STUDENT, **self.student})
        Recipe(**self.student)  # numbers that cannot be meant are an error now

    @override
    def solve(self, problem: Problem, stages: Stages) -> Solution:
        problem.need_unlabelled(self.kind)
        self.check(problem)
        return Solution(
            predictors=[
                self.taught(problem, stages.within(f"pattern-{number}"), problem.mask_scorer(template))
                for number, template in enumerate(problem.templates)
            ]
        )

    def taught(self, problem: Problem, stages: Stages, scorer: Scorer) -> Predictor:
        """The last session's student, for one pattern."""
        problem = self.with_head(problem, scorer)
        teacher = problem.trained(stages, "teacher", scorer)
        for session in range(1, self.sessions + 1):
            part, seed = stages.within(f"session-{session}"), derived(problem.seed, "session", session)
            soft = part.tensor(
                "pseudo-labels", functools.partial(self.pseudo_labels, problem, teacher), temperature=self.temperature
            )
            student = problem.trained(
                part, "student", scorer, (problem.unlabelled, soft),
                objective=self.objective(problem), recipe=self.of_student(problem), seed=seed,
            )  # fmt: skip
            teacher = problem.trained(
                part, "tuned", scorer, recipe=self.of_tuning(problem), seed=seed, start=student.adapter
            )  # fmt: skip
        return teacher

    def with_head(self, problem: Problem, scorer: Scorer) -> Problem:
        """The same, with the language model's head among what is trained."""
        head = language_head(problem.base.model(scorer.auto), problem.methods) if self.head else None
        if head is None:
            return problem
        # Rates go by kind: where an adapter holds copies of weights itself, the recipe is theirs and the head's.
        alone = all(method.kind != head.kind for method in problem.methods)
        rates = {**({head.kind: self.head_rate} if alone else {}), **problem.recipe.rates}
        recipe = dataclasses.replace(problem.recipe, rates=rates)
        return dataclasses.replace(problem, methods=(*problem.methods, head), recipe=recipe)

    def pseudo_labels(self, problem: Problem, teacher: Predictor) -> Tensor:
        """The teacher's probabilities about the unlabelled rows, (rows, labels)."""
        return (teacher.scores(problem.base, problem.unlabelled) / self.temperature).softmax(-1)

    def objective(self, problem: Problem) -> MetaWeighted:
        """What a student learns."""
        steps = self.of_student(problem).steps
        return MetaWeighted(
            problem.train.rows,
            problem.train.labels,
            uniform_steps=math.ceil(self.warmup * steps) if self.reweight else steps,
            size=self.labelled,
            threshold=self.threshold,
        )

    def of_student(self, problem: Problem) -> Recipe:
        """How a student learns from pseudo-labels."""
        return dataclasses.replace(problem.recipe, **self.student)

    def of_tuning(self, problem: Problem) -> Recipe:
        """How it goes on with the labelled rows."""
        size = min(problem.recipe.batch_size, len(problem.train))
        return dataclasses.replace(problem.recipe, steps=self.epochs * (len(problem.train) // size))
