"""In-context learning: the labelled rows are shown to the model in front of the question, and nothing is trained.

    s(l | x) = mean over the sets D of demonstrations of s(l | D, x)          less the offset of calibration

k = 0 is zero-shot. Each of `sets` sets is drawn without replacement, put in its order once and kept with the result, so
that every query is shown the same. A demonstration that does not fit the length goes as a whole, the last one first.

Brown et al. 2020, arXiv:2005.14165; Zhao et al. 2021, arXiv:2102.09690 (calibration).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.learning.seeds import derived
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.problem import Labelled, Problem, System
from inlay.fewshot.scorers.calibration import Calibration, content_free, offset
from inlay.fewshot.scorers.choice import Direction
from inlay.fewshot.scorers.forms import asked
from inlay.fewshot.scorers.scorer import Demonstration
from inlay.fewshot.stages import Stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class ICL(System):
    """Demonstrations in the prompt. Works for masked language models too, as far as their length goes."""

    kind: ClassVar[str] = "icl"
    paper: ClassVar[str] = "Brown et al. 2020, arXiv:2005.14165"

    k: int | None = None
    """Demonstrations, of each label or in total; None: all labelled rows; 0: none."""
    per: Literal["class", "total"] = "class"
    """Whether k counts the demonstrations of each label, or all."""
    balanced: bool = True
    """In total: as many of each label as can be; else as they are drawn."""
    order: Literal["random", "label"] = "random"
    """Mixed, or label after label."""
    sets: int = 1
    """How many sets of demonstrations to ask with; their scores are averaged."""
    calibration: Calibration | None = None
    """contextual: by rows without content; batch: by the unlabelled rows; None: not."""
    direction: Direction = "direct"
    """What a model that writes is asked: see ChoiceScorer."""
    length_norm: float = 1.0
    """By what power of its number of tokens an answer's log-probability is divided; 0: the sum."""

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "per": ("class", "total"),
            "order": ("random", "label"),
            "calibration": (None, "contextual", "batch"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, known))}")
        for name, low in (("k", 0), ("sets", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ConfigError(f"{name}={value!r}: a whole number of at least {low} is needed")

    @override
    def check(self, problem: Problem) -> None:
        for template in problem.templates:
            asked(problem, template, direction=self.direction, length_norm=self.length_norm)

    @override
    def solve(self, problem: Problem, stages: Stages) -> Solution:
        shown = self.drawn(problem.train, problem.labels, problem.seed)
        rows = problem.train.rows
        predictors = []
        for number, template in enumerate(problem.templates):
            predictor = Predictor(
                scorer=asked(problem, template, direction=self.direction, length_norm=self.length_norm),
                demonstrations=[
                    [_shown(rows[index], template.columns, problem.train.labels[index]) for index in chosen]
                    for chosen in shown
                ],
            )
            predictors.append(self._calibrated(predictor, problem, stages, number, shown))
        return Solution(predictors=predictors)

    def drawn(self, train: Labelled, labels: Sequence[str], seed: int) -> list[list[int]]:
        """The numbers of each set's rows, in the order shown; no set at all when k is 0.

        Raises ConfigError when there are fewer rows than demonstrations.
        """
        if self.k == 0:
            return []
        seeds = [derived(seed, "demonstrations", number) for number in range(self.sets)]
        return [self._draw(train, labels, torch.Generator().manual_seed(own)) for own in seeds]

    def _draw(self, train: Labelled, labels: Sequence[str], generator: torch.Generator) -> list[int]:
        order = torch.randperm(len(train), generator=generator).tolist()
        by_label = [[index for index in order if train.labels[index] == label] for label in labels]
        if self.k is None:
            chosen = order
        elif self.per == "class":
            short = next((label for label, own in zip(labels, by_label, strict=True) if len(own) < self.k), None)
            if short is not None:
                raise ConfigError(f"k={self.k} demonstrations of each label are to be shown, and {short!r} has fewer")
            chosen = [index for own in by_label for index in own[: self.k]]
        else:
            if len(order) < self.k:
                raise ConfigError(f"k={self.k} demonstrations are to be shown, and there are {len(order)} rows")
            most = max(map(len, by_label))
            even = [own[turn] for turn in range(most) for own in by_label if turn < len(own)]
            chosen = (even if self.balanced else order)[: self.k]
        if self.order == "label":
            return sorted(chosen, key=lambda index: labels.index(train.labels[index]))
        mixed = torch.randperm(len(chosen), generator=generator).tolist()
        return [chosen[place] for place in mixed]

    def _calibrated(
        self, predictor: Predictor, problem: Problem, stages: Stages, number: int, shown: list[list[int]]
    ) -> Predictor:
        method = self.calibration
        if method is None:
            return predictor
        if method == "contextual":
            rows = content_free(predictor.scorer.template)
        else:
            rows = list(problem.need_unlabelled("batch calibration"))
        found = stages.tensor(
            f"calibration-{number}", lambda: offset(predictor, problem.base, method, rows),
            scorer=predictor.scorer.to_dict(), method=method, shown=shown, rows=len(rows),
            texts=derived(0, predictor.demonstrations, rows),
        )  # fmt: skip
        return dataclasses.replace(predictor, offset=tuple(found.tolist()))


def _shown(row: Any, columns: Sequence[str], label: str) -> Demonstration:
    """A row's demonstration: the columns that the template shows."""
    return {name: row[name] for name in columns if name in row}, label
