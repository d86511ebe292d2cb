"""P-tuning: some of a pattern's words are not words but trained vectors, and a small network computes them together.

    "{text} {soft:Question} what was it? {mask}."       p = MLP(biLSTM(e)),  e: one trained vector for each slot

By itself it trains nothing but the slots, on a frozen base. With `peft` (LoRA, or "full", as the paper has it) the rest
is trained as well, at the recipe's rate, and the slots at a rate of their own.

Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385. Its second version (arXiv:2110.07602) is prefix tuning with
a classification head: the system `standard` with `peft: prefix_tuning`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.problem import Problem, System
from inlay.fewshot.prompts.soft_slots import slots_of
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.stages import Stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuning(System):
    """Prompt-based training with soft slots. Raises ConfigError for a template that has none."""

    kind: ClassVar[str] = "p-tuning"
    paper: ClassVar[str] = "Liu et al. 2021, arXiv:2103.10385"
    peft: ClassVar[Sequence[Mapping[str, Any]]] = ()
    recipe: ClassVar[Mapping[str, Any]] = {"steps": 250, "batch_size": 16}

    encoder: Literal["lstm", "mlp"] | None = "lstm"
    """What computes the vectors: a bidirectional LSTM and two linears, three linears, or nothing."""
    hidden_size: int | None = None
    """The encoder's width; by default the embedding's."""
    rate: float = 1e-3
    """The slots' own peak rate; the recipe's is for what is trained beside them."""

    def __post_init__(self) -> None:
        if self.encoder not in ("lstm", "mlp", None):
            raise ConfigError(f"encoder={self.encoder!r}: choose 'lstm', 'mlp' or None")
        if not self.rate > 0:
            raise ConfigError(f"rate={self.rate!r}: a number above 0 is needed")

    @override
    def check(self, problem: Problem) -> None:
        super().check(problem)
        for template in problem.templates:
            if not template.soft:
                raise ConfigError(
                    f"p-tuning trains soft slots, and the template {template.source!r} has none: write {{soft:3}}, or "
                    "{soft:Question} for slots that start as a word"
                )

    @override
    def solve(self, problem: Problem, stages: Stages) -> Solution:
        self.check(problem)
        return Solution(
            predictors=[
                self.trained(problem, stages, f"pattern-{number}", template)
                for number, template in enumerate(problem.templates)
            ]
        )

    def trained(self, problem: Problem, stages: Stages, name: str, template: Template) -> Predictor:
        """One pattern's slots, and what is trained beside them."""
        scorer = problem.mask_scorer(template)
        slots = slots_of(scorer, encoder=self.encoder, hidden_size=self.hidden_size)
        rates = {"soft_slots": self.rate, **problem.recipe.rates}
        return problem.trained(
            stages, name, scorer, methods=[*problem.methods, slots],
            recipe=dataclasses.replace(problem.recipe, rates=rates),
        )  # fmt: skip
