"""The training loop of few-shot learning: a few hundred steps on a few rows, the same again from the same seed.

One optimiser step is one batch of labelled rows (drawn without replacement, epoch after epoch) through a scorer into an
objective. What is trained is what the model says is trainable: the adapter, or everything, that is attached to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Adafactor, PreTrainedModel, get_scheduler

from inlay.engine.adapters import adapters_of, controllers
from inlay.engine.controller import Controller
from inlay.engine.field_types import check_fields, check_type
from inlay.errors import ConfigError, TrainingError, did_you_mean
from inlay.fewshot.learning.modes import in_mode
from inlay.fewshot.learning.objectives import Objective, Step, as_targets
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.scorers.scorer import Demonstration, Scorer, on
from inlay.train.trainer import untouched_random_states

Demonstrator = Callable[[Sequence[int], torch.Generator], Sequence[Sequence[Demonstration]]]
"""(numbers of the batch's rows, what to draw from) -> demonstrations for each of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how fast. Raises ConfigError for numbers that cannot be meant."""

    steps: int = 200
    """Optimiser steps."""
    batch_size: int = 8
    """Labelled rows in a step; all of them where there are fewer."""
    learning_rate: float = 1e-3
    """The peak."""
    weight_decay: float = 0.01
    """AdamW's."""
    warmup: float = 0.06
    """Share of the steps that lead up to the peak; from there the rate falls to 0 in a straight line."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    optimizer: str = "adamw"
    """adamw, or adafactor: the rate times each tensor's own scale, no momentum (Shazeer & Stern, arXiv:1804.04235)."""
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Other peaks for some methods of the adapter, by their kind: {"full": 1e-5}."""

    def __post_init__(self) -> None:
        check_fields(Recipe, vars(self), "recipe")
        for name, low in (("steps", 0), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)!r}: a whole number of at least {low} is needed")
        if self.optimizer not in ("adamw", "adafactor"):
            raise ConfigError(f"optimizer={self.optimizer!r}: choose one of adamw, adafactor")
        for name, rate in {"learning_rate": self.learning_rate, **self.rates}.items():
            check_type(rate, float, f"recipe: {name}")
            if not rate > 0 or not math.isfinite(rate):
                raise ConfigError(f"{name}={rate!r}: a number above 0 is needed")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup={self.warmup!r}: a share of the steps, from 0 to 1, is needed")
        if not self.clip > 0:
            raise ConfigError(f"clip={self.clip!r}: a number above 0 is needed; float('inf') clips nothing")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay={self.weight_decay!r}: a number of at least 0 is needed")


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a training was."""

    losses: list[float]
    seconds: float

    def hardly_learned(self, labels: int) -> str | None:
        """What to say of a cross entropy over so many labels that scarcely fell, though it is far from 0; else None."""
        count = max(5, len(self.losses) // 10)
        if len(self.losses) < 2 * count:
            return None
        first, last = statistics.fmean(self.losses[:count]), statistics.fmean(self.losses[-count:])
        if last < 0.9 * first or last < 0.5 * math.log(labels):
            return None
        return (
            f"the loss went from {first:.3f} to {last:.3f} in {len(self.losses)} steps, so little was learned: raise "
            "the learning rate or the steps (--set recipe.learning_rate=… recipe.steps=…)"
        )


def fit(
    model: PreTrainedModel,
    scorer: Scorer,
    rows: Sequence[Row],
    labels: Sequence[str] | Tensor,
    *,
    objective: Objective | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    demonstrator: Demonstrator | None = None,
    each_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Fit:
    """Train the model's trainable parameters on rows with their labels (names, or probabilities (rows, labels)).

    Without an objective it is the scorer's own. Random states outside and training flags are left as they were, and no
    gradients. Raises TrainingError when the loss is no number, ConfigError when nothing is trainable or there are no
    rows, DataError for labels that the scorer does not have.
    """
    recipe, objective = recipe or Recipe(), objective or scorer.objective()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.steps and not (rows and trained):
        raise ConfigError("there are no rows to train on" if not rows else "nothing of the model is trainable")
    _check_soft_slots(model, scorer)
    targets = as_targets(labels, scorer.labels)
    optimizer = _optimizer(model, recipe)
    warmup = round(recipe.warmup * recipe.steps)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=recipe.steps)
    called = controllers(model)
    for controller in called:
        controller.prepare(recipe.steps)
    encoded = scorer.encode(rows) if demonstrator is None else None
    device, losses, begun = next(model.parameters()).device, list[float](), time.monotonic()
    with untouched_random_states(), in_mode(model, training=True), _without_gradients(trained):
        torch.manual_seed(seed)
        for number, (chosen, generator) in zip(range(recipe.steps), _batches(len(rows), recipe, seed), strict=False):
            if encoded is not None:
                examples = [encoded[index] for index in chosen]
            else:
                assert demonstrator is not None
                examples = scorer.encode([rows[index] for index in chosen], demonstrator(chosen, generator))
            examples = scorer.draw(examples, generator)
            batch = on(device, scorer.collate(examples))
            loss = objective(Step(model, scorer, examples, batch, targets[chosen].to(device), generator, number))
            loss = sum((term for c in called if (term := c.extra_loss()) is not None), loss)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"the loss became {losses[-1]} at step {number + 1} of {recipe.steps}: lower the learning rate "
                    f"(now {recipe.learning_rate:g})"
                )
            nn.utils.clip_grad_norm_(trained, recipe.clip)
            _stepped(optimizer, called)
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            each_step(number + 1, losses[-1])
    return Fit(losses, time.monotonic() - begun)


def _check_soft_slots(model: nn.Module, scorer: Scorer) -> None:
    if scorer.template.soft and "soft_slots" not in _kinds(model):
        raise ConfigError(
            f"the template {scorer.template.source!r} has soft slots, and nothing that is attached trains them: attach "
            "`inlay.fewshot.prompts.soft_slots.slots_of(scorer)` too"
        )


def _stepped(optimizer: torch.optim.Optimizer, called: Sequence[Controller]) -> None:
    """One step of the optimiser, with what the methods do before and after it."""
    for controller in called:
        controller.before_step(optimizer)
    optimizer.step()
    for controller in called:
        controller.after_step(optimizer)


@contextlib.contextmanager
def _without_gradients(trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """No gradient is there at first, nor at the end: a step that failed leaves none to the next training."""
    for parameter in trained:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter in trained:
            parameter.grad = None


def _batches(count: int, recipe: Recipe, seed: int) -> Iterator[tuple[list[int], torch.Generator]]:
    """Row numbers of each step, and the generator that the step may draw from, without end."""
    order, size, step = torch.Generator().manual_seed(seed), min(recipe.batch_size, count), 0
    while True:
        shuffled = torch.randperm(count, generator=order).tolist()
        for start in range(0, count - size + 1, size):
            yield shuffled[start : start + size], torch.Generator().manual_seed(hash((seed, step)) % 2**31)
            step += 1


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = _groups(model, recipe)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)  # one pass over all that is trained
    return Adafactor(groups, lr=recipe.learning_rate, scale_parameter=True, relative_step=False, warmup_init=False)  # type: ignore[no-untyped-call]


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and scales do not. Methods with rates of their own have groups of their own."""
    kinds = _kinds(model)
    for kind in recipe.rates:
        if kind not in kinds:
            raise ConfigError(
                f"rates: the adapter has no method {kind!r}{did_you_mean(kind, kinds)}; it has {', '.join(kinds)}"
            )
    own = {id(p): rate for kind, rate in recipe.rates.items() for p in kinds[kind]}
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (own.get(id(parameter), recipe.learning_rate), parameter.ndim >= 2)
            found.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": recipe.weight_decay * matrices}
        for (rate, matrices), members in found.items()
    ]


def _kinds(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each kind of method that is attached."""
    found: dict[str, list[nn.Parameter]] = {}
    for adapter in adapters_of(model).loaded.values():
        for method, placed in zip(adapter.methods, adapter.placed, strict=True):
            found.setdefault(method.kind, []).extend(p for _, piece in placed for p in piece.parameters())
    return found
