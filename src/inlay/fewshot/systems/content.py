"""Few-shot content analysis: an adapter, a pattern of several masks read in one pass, and a head of the labels' words.

    "{text} This is a {mask*2} arms deliveries."    score of a label: Σ_i (V h_i + c)[its i-th token]

The head has a row for each token of the labels' words and no others. It starts as the language model's own rows, and is
trained and saved with the adapter, a few megabytes. An adapter from a near-domain task may be the start (`start`): its
body is taken over, its words are exchanged. How far runs agree is `agreement.py`'s to say.

Wiegmann et al. 2023, arXiv:2312.16975; Rieger et al. 2024 (PETapter), arXiv:2412.04975.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from inlay.engine.files import CONFIG
from inlay.errors import ConfigError
from inlay.fewshot.methods.restricted_head import RestrictedHead
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.problem import Problem, System
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.stages import Stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content(System):
    """Adapters with parallel masks and a small head. Raises ConfigError for {mask*}, which is filled one by one."""

    kind: ClassVar[str] = "content"
    paper: ClassVar[str] = "Wiegmann et al. 2023, arXiv:2312.16975"
    peft: ClassVar[Sequence[Mapping[str, Any]]] = ({"kind": "adapter", "placement": "pfeiffer"},)
    recipe: ClassVar[Mapping[str, Any]] = {"steps": 300}

    head: bool = True
    """Whether the rows of the labels' words are trained, and saved with the adapter; if not, they are the model's."""
    start: str | None = None
    """The folder of an adapter from a near-domain task, made with the same `peft`, to start from."""

    @override
    def check(self, problem: Problem) -> None:
        super().check(problem)
        for template in problem.templates:
            self.scorer(problem, template)
        if self.start is not None and not (Path(self.start) / CONFIG).is_file():
            raise ConfigError(f"start={self.start!r}: there is no adapter there (a folder with {CONFIG})")

    @override
    def solve(self, problem: Problem, stages: Stages) -> Solution:
        self.check(problem)
        return Solution(
            predictors=[
                self.trained(problem, stages, f"pattern-{number}", template)
                for number, template in enumerate(problem.templates)
            ]
        )

    def scorer(self, problem: Problem, template: Template) -> MaskScorer:
        """All masks in one pass. Raises ConfigError for a pattern whose words are not all of one length."""
        if template.need_mask().masks is None:
            raise ConfigError(
                f"{template.source!r} has {{mask*}}, and content reads all masks at once: write how many there are, "
                "{mask*2}, and choose words of as many tokens"
            )
        made = problem.mask_scorer(template, restrict=True)
        assert isinstance(made, MaskScorer)
        return made

    def trained(self, problem: Problem, stages: Stages, name: str, template: Template) -> Predictor:
        """One pattern's adapter."""
        scorer = self.scorer(problem, template)
        head = [RestrictedHead(token_ids=scorer.tokens)] if self.head else []
        return problem.trained(stages, name, scorer, methods=[*problem.methods, *head], start=self.start)
