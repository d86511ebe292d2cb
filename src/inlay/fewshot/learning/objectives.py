"""Objectives of few-shot training: what is made small at each step. They add up, and take a factor.

    objective = CrossEntropy() + 1e-4 * AuxiliaryMaskedLM(unlabelled)

Each is called with a `Step`, one labelled batch with its scores, and returns a number with gradients.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from inlay.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from inlay.fewshot.prompts.encoding import Encoded
    from inlay.fewshot.scorers.scorer import Batch, Scorer


@dataclasses.dataclass
class Step:
    """One training step: a batch of examples, what they should be, and what the model says."""

    model: PreTrainedModel
    scorer: Scorer
    encoded: Sequence[Encoded]
    batch: Batch
    targets: Tensor
    """Labels by their numbers (rows,), or probabilities over the labels (rows, labels)."""
    generator: torch.Generator
    """What the step may draw from; its state depends on the seed and the step alone."""
    number: int = 0
    """Which step of the training it is, from 0."""

    kept: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """What the terms of this step's loss share, by name, so that it is computed once."""

    _scores: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """The scores (rows, labels); computed once, when first asked for."""
        if self._scores is None:
            self._scores = self.scorer(self.model, self.batch)
        return self._scores


class Objective(abc.ABC):
    """A term of the loss. Subclasses say `__call__(step) -> number`."""

    @abc.abstractmethod
    def __call__(self, step: Step) -> Tensor:
        """The term's value."""

    def __add__(self, other: Objective) -> Objective:
        return _Sum((*_terms(self), *_terms(other)))

    def __rmul__(self, factor: float) -> Objective:
        return _Sum(tuple((factor * own, term) for own, term in _terms(self)))


@dataclasses.dataclass(frozen=True)
class _Sum(Objective):
    terms: tuple[tuple[float, Objective], ...]

    @override
    def __call__(self, step: Step) -> Tensor:
        values = [factor * term(step) for factor, term in self.terms if factor != 0]
        if not values:
            raise ConfigError(f"every term of the objective {self.terms} has the factor 0: give one another")
        return torch.stack(values).sum() if len(values) > 1 else values[0]


def _terms(objective: Objective) -> tuple[tuple[float, Objective], ...]:
    return objective.terms if isinstance(objective, _Sum) else ((1.0, objective),)


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Objective):
    """− log softmax(scores)[label], the mean over the rows; with probabilities as targets their cross-entropy."""

    @override
    def __call__(self, step: Step) -> Tensor:
        return functional.cross_entropy(step.scores, step.targets)


@dataclasses.dataclass(frozen=True)
class Hinge(Objective):
    """Σ over the wrong labels l of max(0, margin − scores[label] + scores[l]), the mean over the rows.

    Multi-mask PET's, where scores are log-likelihoods of the labels' words: Schick & Schütze 2021, arXiv:2009.07118.
    Raises ConfigError for targets that are probabilities: it asks which label is right.
    """

    margin: float = 1.0

    @override
    def __call__(self, step: Step) -> Tensor:
        if step.targets.ndim != 1:
            raise ConfigError("Hinge learns from labels, and the targets are probabilities: use CrossEntropy")
        own = step.targets[:, None]
        over = (self.margin - step.scores.gather(1, own) + step.scores).clamp_min(0)
        return over.scatter(1, own, 0.0).sum(-1).mean()


@dataclasses.dataclass(frozen=True)
class Distillation(Objective):
    """T² · KL(targets^(1/T) ‖ softmax(scores / T)), the mean over the rows; targets are probabilities.

    Hinton et al. 2015, arXiv:1503.02531; T² keeps the gradient's scale. Targets p are softened to p^(1/T), normalised:
    the softmax of the teacher's scores over T. Raises ConfigError for labels as targets.
    """

    temperature: float = 2.0

    @override
    def __call__(self, step: Step) -> Tensor:
        if step.targets.ndim != 2:
            raise ConfigError("Distillation learns from a teacher's probabilities, and the targets are labels: "
                              "use CrossEntropy")  # fmt: skip
        soft = functional.softmax(step.targets.clamp_min(1e-30).log() / self.temperature, -1)
        log_student = functional.log_softmax(step.scores / self.temperature, -1)
        return functional.kl_div(log_student, soft, reduction="batchmean") * self.temperature**2


@dataclasses.dataclass(frozen=True)
class Interval(Objective):
    """Regression between two words: KL((1 − t, t) ‖ softmax(scores)), t = (y − low) / (high − low), the mean over rows.

    Targets y are numbers (rows,) from `low` to `high`; the scorer has two labels, that of `low` first. Raises
    ConfigError for other scorers and limits, DataError for targets outside. Gao et al. 2021, arXiv:2012.15723.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError(f"an interval from {self.low!r} to {self.high!r}: the first has to be the smaller number")

    def values(self, scores: Tensor) -> Tensor:
        """What scores (rows, 2) say: low · p(low's word) + high · p(high's word), (rows,)."""
        return functional.softmax(scores, -1) @ scores.new_tensor([self.low, self.high])

    @override
    def __call__(self, step: Step) -> Tensor:
        if step.scores.shape[-1] != 2:
            raise ConfigError(f"an interval has two ends, and the scorer has {step.scores.shape[-1]} labels: give two")
        shares = (step.targets.to(step.scores) - self.low) / (self.high - self.low)
        if shares.ndim != 1 or shares.min() < 0 or shares.max() > 1:
            raise DataError(f"targets must be numbers from {self.low:g} to {self.high:g}, one for each row")
        log_probs = functional.log_softmax(step.scores, -1)
        return functional.kl_div(log_probs, torch.stack([1 - shares, shares], -1), reduction="batchmean")


def as_targets(labels: Any, names: Sequence[str]) -> Tensor:
    """Labels by name as numbers (rows,); probabilities (rows, labels) as they are. DataError for an unknown label."""
    if isinstance(labels, Tensor):
        return labels
    numbers = {name: number for number, name in enumerate(names)}
    unknown = next((label for label in labels if label not in numbers), None)
    if unknown is not None:
        raise DataError(
            f"a row has the label {unknown!r}{did_you_mean(str(unknown), names)}; the labels are: {', '.join(names)}"
        )
    return torch.tensor([numbers[label] for label in labels])
