"""Taking off what a model says whatever it is asked: an offset for each label's log-probability.

    q(l | x) ∝ p(l | x) / c(l)                      argmax and probabilities of log p(l | x) − log c(l)

    contextual    c = p_cf, the mean of p(· | x') over inputs x' without content: "N/A", "[MASK]", ""
    batch         log c = the mean of log p(· | x) over a batch of unlabelled rows

q is what W p with W = diag(p_cf)⁻¹ comes to when it is made to sum to one. The original writes softmax(W p), which has
the same argmax. A set of demonstrations is calibrated with the same set before the rows without content.

Zhao et al. 2021, arXiv:2102.09690 (contextual); Zhou et al. 2024, arXiv:2309.17249 (batch).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from inlay.errors import ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.predictor import Predictor
from inlay.fewshot.prompts.template import Row, Template

Calibration = Literal["contextual", "batch"]
CONTENT_FREE = ("N/A", "[MASK]", "")


def content_free(template: Template, inputs: Sequence[str] = CONTENT_FREE) -> list[Row]:
    """Rows that say nothing: each column that the template shows holds one of the inputs."""
    return [dict.fromkeys(template.columns, text) for text in inputs]


def offset(predictor: Predictor, base: Base, method: Calibration, rows: Sequence[Row], **options: int) -> Tensor:
    """log c (labels,): contextual over rows without content, batch over rows as they come.

    Of several sets of demonstrations the mean: the predictor averages their scores, so that this calibrates each set
    by itself. Raises ConfigError when there are no rows.
    """
    if method not in ("contextual", "batch"):
        raise ConfigError(f"calibration={method!r}: choose one of contextual, batch")
    if not rows:
        raise ConfigError(f"{method} calibration needs at least one row to ask about, and there is none")
    found = []
    for one_set in predictor.each_set(base, rows, **options):
        log_probs = one_set.double().log_softmax(-1)
        if method == "contextual":
            found.append(log_probs.exp().mean(0).clamp_min(1e-30).log())
        else:
            found.append(log_probs.mean(0))
    return torch.stack(found).mean(0)


def calibrated(predictor: Predictor, base: Base, method: Calibration, rows: Sequence[Row], **options: int) -> Predictor:
    """The predictor with its offset."""
    return dataclasses.replace(predictor, offset=tuple(offset(predictor, base, method, rows, **options).tolist()))
