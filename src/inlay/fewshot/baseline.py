"""The baseline of every report: in-context learning by the same base with the same labelled rows, nothing trained.

The rows stand in front of the question, as many as the model can read, up to LENGTH tokens. What it answers costs
nothing beforehand and many times more for every answer; a system that does not beat it was not worth its training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inlay.errors import ConfigError
from inlay.fewshot.flops import cost
from inlay.fewshot.problem import Problem
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.scorers.forms import form_of
from inlay.fewshot.stages import Stages
from inlay.fewshot.systems.icl import ICL
from inlay.tasks.class_metrics import single_label_scores

NAME = "in-context"
LENGTH = 512
"""Tokens of a prompt at most; a run's own `max_length` holds one example and hardly a demonstration."""
ROWS = 100
"""Test rows that it is measured on at most: an answer reads all demonstrations again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """What in-context learning says on the test rows, or on some of them."""

    test: Mapping[str, float]
    """The metrics."""
    rows: int
    """On how many test rows."""
    flops: float
    """Floating-point operations of one answer."""
    tokens: float
    """Tokens that are read for one answer."""


def in_context(problem: Problem, rows: Sequence[Row], true: np.ndarray, stages: Stages, costed: int) -> Baseline | None:
    """Ask with the problem's first template on at most ROWS test rows with the label numbers `true` (rows,).

    None where the untrained base cannot be asked: no template, soft slots, words that the template has no gaps for.
    The cost is counted on `costed` of the rows.
    """
    try:
        problem.base.model(form_of(problem.base))  # from here on the tokenizer knows how much it reads
        length = max(problem.max_length, min(LENGTH, problem.base.tokenizer.model_max_length))
        asked = dataclasses.replace(problem, templates=problem.templates[:1], max_length=length)
        ICL().check(asked)
        solution = ICL().solve(asked, stages.within(NAME))
    except ConfigError:
        return None
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(problem.seed))[:ROWS].tolist()
    some = [rows[index] for index in order]

    def measure(folder: Path) -> dict[str, Any]:
        scores = solution.scores(problem.base, some)
        spent = cost(solution, problem.base, some[:costed])
        test = single_label_scores(scores.argmax(-1).numpy(), true[order])
        return {"test": test, "rows": len(some), "flops": spent.flops, "tokens": spent.tokens}

    shown = solution.predictors[0].to_dict(Path())
    note = stages.once(f"{NAME}/test", measure, predictor=shown, rows=len(rows))
    return Baseline(**{field.name: note[field.name] for field in dataclasses.fields(Baseline)})
