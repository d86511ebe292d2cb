"""LM-BFF: prompt-based fine-tuning with demonstrations, and with templates or label words that are searched.

    p(y | x) = softmax over labels of the mean over sets D of  M(v(y) | T(x) ⊕ T(x_1, y_1) ⊕ … ⊕ T(x_C, y_C))

What is chosen (the step, a point of the grid, templates, words) is chosen on the development rows, as many as there are
labelled ones.

Gao et al. 2021, "Making Pre-trained Language Models Better Few-shot Learners", arXiv:2012.15723.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.learning.tuning import Tuning, grid_points
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.problem import Problem, System
from inlay.fewshot.prompts.demonstrations import Demonstrations, Order
from inlay.fewshot.scorers.scorer import Scorer
from inlay.fewshot.searches.prompt_search import Prompting, found_labels, found_templates, given
from inlay.fewshot.searches.ranking import rank
from inlay.fewshot.stages import Stages

WHOLE = ("sets", "checks", "k", "n", "beam", "ensemble", "budget")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMBFF(System):
    """Better few-shot fine-tuning of language models. Raises ConfigError for settings that cannot be used."""

    kind: ClassVar[str] = "lm-bff"
    paper: ClassVar[str] = "Gao et al. 2021, arXiv:2012.15723"
    dev: ClassVar[int | str] = "same"
    recipe: ClassVar[Mapping[str, Any]] = {"weight_decay": 0.0}

    demonstrations: bool = True
    """Whether one labelled row of each class stands behind the query; examples may then be twice as long."""
    filter: float = 0.5
    """The share of each class, the most like the query, that demonstrations are drawn from; 1: all."""
    sets: int = 16
    """How many sets of demonstrations a row is asked with for inference."""
    order: Order = "label"
    """How the demonstrations stand: in the order of the labels, or at random."""
    demonstration_tokens: int | None = None
    """Tokens of a demonstration's column at most; None: max_length over the demonstrations' columns in all."""
    checks: int = 10
    """How often, evenly over the training, the development rows are asked; the best step is kept."""
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    """Recipes to choose from, {"learning_rate": [1e-5, 2e-5], "batch_size": [2, 8]}: every combination is trained."""
    search: Literal["labels", "templates"] | None = None
    """What to search; each of the `n` found is trained, and the best on the development rows answer."""
    generator: str | None = None
    """The model that writes templates: T5 or another with sentinel tokens, a folder or hub id."""
    n: int = 100
    """How many label words or templates are trained."""
    k: int = 100
    """Words of each label that combinations are made of."""
    near: int | None = None
    """Of these only so many that are nearest to the word given; None: all."""
    budget: int = 1_000_000
    """How many combinations of words are scored."""
    beam: int = 100
    """Of the search for templates."""
    ensemble: int = 1
    """How many of the best found answer together; templates that are given all do."""

    def __post_init__(self) -> None:
        for name in (
            *WHOLE,
            *(other for other in ("near", "demonstration_tokens") if getattr(self, other) is not None),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}: a whole number of at least 1 is needed")
        if not 0 < self.filter <= 1:
            raise ConfigError(f"filter={self.filter!r}: a share of each class, above 0 and up to 1, is needed")
        for name, known in (("order", ("label", "random")), ("search", (None, "labels", "templates"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, known))}")
        if self.search == "templates" and self.generator is None:
            raise ConfigError("search='templates' needs a model that writes them: generator= a T5's folder or hub id")
        grid_points(self.grid)

    @override
    def check(self, problem: Problem) -> None:
        if self.search == "labels":
            for template in problem.templates:
                if template.masks != 1 or template.soft:
                    raise ConfigError(
                        f"label words are searched at one {{mask}} between words, and {template.source!r} has "
                        f"{'soft slots: write words in their place' if template.soft else 'others'}"
                    )
        else:
            for prompt in given(problem):
                self.scorer(problem, prompt)

    @override
    def solve(self, problem: Problem, stages: Stages) -> Solution:
        self.check(problem)
        tuning = Tuning(problem, stages, grid_points(self.grid), self.checks)
        prompts = self.prompts(tuning)

        def trained(number: int) -> Predictor:
            prompt = prompts[number]
            return tuning.trained(f"prompt-{number}", self.scorer(problem, prompt), self.shown(problem, prompt))

        if self.search is None:
            return Solution(predictors=[trained(number) for number in range(len(prompts))])
        ranked = rank(range(len(prompts)), trained, tuning.measured)
        return Solution(predictors=[one.made for one in ranked[: self.ensemble]])

    def prompts(self, tuning: Tuning) -> list[Prompting]:
        """What is trained. Raises ConfigError when there is something to choose and nothing to choose by."""
        if self.search is not None or len(tuning.points) > 1:
            tuning.dev  # noqa: B018 - what cannot be chosen is an error before anything is trained
        if self.search == "labels":
            problem, stages = tuning.problem, tuning.stages
            return found_labels(problem, stages, k=self.k, n=self.n, near=self.near, budget=self.budget)
        if self.search == "templates":
            return found_templates(tuning.problem, tuning.stages, str(self.generator), n=self.n, beam=self.beam)
        return given(tuning.problem)

    def scorer(self, problem: Problem, prompt: Prompting) -> Scorer:
        """A prompt's scorer, with room for demonstrations."""
        options: dict[str, Any] = {}
        if self.demonstrations:
            columns = len(problem.labels) * len(prompt.template.columns)
            tokens = self.demonstration_tokens or max(8, problem.max_length // columns)
            options = {"max_length": 2 * problem.max_length, "demonstration_tokens": tokens}
        return problem.mask_scorer(prompt.template, prompt.verbalizer, **options)

    def shown(self, problem: Problem, prompt: Prompting) -> Demonstrations | None:
        """What a prompt's demonstrations are drawn from."""
        if not self.demonstrations:
            return None
        columns = prompt.template.columns
        return Demonstrations(
            rows=[{column: row[column] for column in columns} for row in problem.train.rows],
            labels=problem.train.labels, names=problem.labels, columns=columns, keep=self.filter, sets=self.sets,
            order=self.order, seed=problem.seed,
        )  # fmt: skip
