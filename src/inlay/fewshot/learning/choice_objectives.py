"""T-Few's three losses over the tokens of the choices (Liu et al. 2022, arXiv:2205.05638, section 3.2).

    L_LM = − Σ_t log p(y_t | x, y_<t) / T               over the T tokens of the right choices of the batch
    L_LN = − log softmax over the choices of beta(x, y) [right]
    L_UL = − Σ_t log(1 − p(y'_t | x, y'_<t) + eps) / T'  over the T' tokens of the wrong choices y' of the batch

    objective = TargetNLL() + LengthNormalised() + Unlikelihood()

All three read the same pass of the model. Of a label with several words the first is the right choice to write, as in
demonstrations, and all words of the other labels are wrong. Each raises ConfigError for a scorer that puts no choices,
or does not ask for the answer (direction="direct"), and for targets that are probabilities.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.learning.objectives import Objective, Step
from inlay.fewshot.scorers.choice import ChoiceScorer
from inlay.fewshot.scorers.drawn import DrawnScorer


def _chosen(step: Step) -> tuple[ChoiceScorer, Tensor, Tensor]:
    """The scorer, the log-probabilities of the choices' tokens (rows, words, tokens), and where there are any."""
    scorer = step.scorer.scorers[0] if isinstance(step.scorer, DrawnScorer) else step.scorer
    if not isinstance(scorer, ChoiceScorer) or scorer.direction != "direct":
        raise ConfigError(
            "losses over the tokens of choices need a scorer that asks for the answer: ChoiceScorer, direction='direct'"
        )
    if step.targets.ndim != 1:
        raise ConfigError("losses over the tokens of choices need one label a row, and were given probabilities")
    if "choices" not in step.kept:
        step.kept["choices"] = scorer.token_log_probs(step.model, step.batch)
    return scorer, step.kept["choices"], step.batch["choice_mask"]


@dataclasses.dataclass(frozen=True)
class TargetNLL(Objective):
    """L_LM: the negative log-likelihood of the right choices, the mean over their tokens."""

    @override
    def __call__(self, step: Step) -> Tensor:
        scorer, log_probs, real = _chosen(step)
        right = scorer.words_of[:, 0].to(log_probs.device)[step.targets]
        rows = torch.arange(len(right), device=right.device)
        return -log_probs[rows, right].sum() / real[rows, right].sum()


@dataclasses.dataclass(frozen=True)
class LengthNormalised(Objective):
    """L_LN: cross-entropy over the choices' length-normalised scores (the scorer's `length_norm`)."""

    @override
    def __call__(self, step: Step) -> Tensor:
        scorer, log_probs, real = _chosen(step)
        return functional.cross_entropy(scorer.by_label(scorer.beta(log_probs, real)), step.targets)


@dataclasses.dataclass(frozen=True)
class Unlikelihood(Objective):
    """L_UL: −log(1 − p + eps), the mean over the tokens of the wrong choices; between −log(1 + eps) and −log eps."""

    eps: float = 0.01
    """Keeps the loss finite where a wrong token is certain."""

    @override
    def __call__(self, step: Step) -> Tensor:
        scorer, log_probs, real = _chosen(step)
        owners = torch.tensor([
            label for label, words in enumerate(scorer.verbalizer.words.values()) for _ in words
        ], device=log_probs.device)  # fmt: skip
        wrong = real & (owners != step.targets[:, None])[..., None]
        return -(1 - log_probs[wrong].exp() + self.eps).log().sum() / wrong.sum().clamp_min(1)
