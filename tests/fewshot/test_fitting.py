"""Training is the same again from the same seed, touches what is trainable, and nothing outside."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.controller import Controller
from inlay.errors import ConfigError, DataError, TrainingError
from inlay.fewshot.learning.fitting import Fit, Recipe, fit
from inlay.fewshot.learning.objectives import CrossEntropy, Distillation, Objective, Step
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.methods.lora import LoRA

ROWS = [{"text": text} for text in ("a good film", "bad film", "great", "the awful movie", "fine", "terrible")]
LABELS = ["pos", "neg", "pos", "neg", "pos", "neg"]
RECIPE = Recipe(steps=7, batch_size=4, learning_rate=0.02)


@pytest.fixture
def scorer(tokenizer: PreTrainedTokenizerFast) -> MaskScorer:
    return MaskScorer(
        tokenizer=tokenizer, template=Template("{text} is {mask}"), verbalizer=Verbalizer({"neg": "no", "pos": "yes"})
    )


@pytest.fixture
def model(bert: BertForMaskedLM) -> BertForMaskedLM:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        inlay.attach(bert, LoRA(r=2, dropout=0.1))
    return bert


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_the_same_seed_gives_the_same_bits(model: BertForMaskedLM, scorer: MaskScorer) -> None:
    begun, found = state(model), list[tuple[list[float], dict[str, torch.Tensor]]]()
    for seed, noise in ((1, 0), (1, 99), (2, 0)):
        model.load_state_dict(begun)
        torch.manual_seed(noise)  # what was drawn outside before must not matter
        found.append((fit(model, scorer, ROWS, LABELS, recipe=RECIPE, seed=seed).losses, state(model)))
    (first, trained), (again, retrained), (other, _) = found
    assert first == again
    assert all(torch.equal(trained[name], retrained[name]) for name in trained)
    assert first != other


def test_only_what_is_trainable_changes(model: BertForMaskedLM, scorer: MaskScorer) -> None:
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = state(model)
    fit(model, scorer, ROWS, LABELS, recipe=RECIPE)
    after = state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= trainable


def test_random_states_outside_and_the_mode_stay(model: BertForMaskedLM, scorer: MaskScorer) -> None:
    model.eval()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    fit(model, scorer, ROWS, LABELS, recipe=RECIPE)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not model.training


def test_it_learns(bert: BertForMaskedLM, scorer: MaskScorer) -> None:
    inlay.attach(bert, LoRA(r=4))
    rows, labels = [{"text": text} for text in ("good", "bad", "good film", "bad film")], ["pos", "neg"] * 2
    seen = list[tuple[int, float]]()
    recipe = Recipe(steps=40, batch_size=4, learning_rate=0.02)
    begun = scorer.scores(bert, rows)
    done = fit(bert, scorer, rows, labels, recipe=recipe, each_step=lambda step, loss: seen.append((step, loss)))
    assert done.losses[-1] < 0.1 < done.losses[0]
    assert seen == list(enumerate(done.losses, start=1))
    assert begun.argmax(-1).tolist() != [1, 0, 1, 0]
    assert scorer.scores(bert, rows).argmax(-1).tolist() == [1, 0, 1, 0]


def test_it_says_when_little_was_learned(bert: BertForMaskedLM, scorer: MaskScorer) -> None:
    inlay.attach(bert, LoRA(r=4))
    slow, fast = (
        fit(bert, scorer, ROWS, LABELS, recipe=Recipe(steps=60, learning_rate=rate)) for rate in (1e-8, 0.02)
    )
    assert "raise the learning rate" in str(slow.hardly_learned(2))
    assert fast.hardly_learned(2) is None


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([0.69] * 40, True),
        ([0.69] * 9, False),  # too short to say
        ([0.69] * 20 + [0.4] * 20, False),
        ([0.2] * 40, False),  # it was good from the start
    ],
)
def test_little_was_learned_where_a_high_loss_stays(losses: list[float], told: bool) -> None:
    assert (Fit(losses, 1.0).hardly_learned(2) is not None) == told


def test_no_steps_leave_the_model_alone(model: BertForMaskedLM, scorer: MaskScorer) -> None:
    before = state(model)
    assert fit(model, scorer, ROWS, LABELS, recipe=Recipe(steps=0)).losses == []
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_controllers_are_called_around_each_step(model: BertForMaskedLM, scorer: MaskScorer) -> None:
    calls = list[Any]()

    class Watcher(Controller):
        def prepare(self, total_steps: int) -> None:
            calls.append(total_steps)

        def extra_loss(self) -> torch.Tensor:
            calls.append("extra")
            return torch.tensor(100.0)

        def before_step(self, optimizer: torch.optim.Optimizer) -> None:
            assert any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
            calls.append("before")

        def after_step(self, optimizer: torch.optim.Optimizer) -> None:
            calls.append("after")

    adapters_of(model).loaded["default"].controllers.append(Watcher())
    done = fit(model, scorer, ROWS, LABELS, recipe=Recipe(steps=2, batch_size=4))
    assert calls == [2, *["extra", "before", "after"] * 2]
    assert min(done.losses) > 100


def test_every_row_is_seen_once_an_epoch_and_draws_depend_on_the_step(
    model: BertForMaskedLM, scorer: MaskScorer
) -> None:
    def run(seed: int) -> tuple[list[list[int]], list[float]]:
        drawn, chosen = list[float](), list[list[int]]()

        def demonstrator(numbers: Any, generator: torch.Generator) -> Any:
            chosen.append(list(numbers))
            drawn.append(torch.rand((), generator=generator).item())
            return [()] * len(numbers)

        recipe = Recipe(steps=6, batch_size=2)
        fit(model, scorer, ROWS, LABELS, recipe=recipe, seed=seed, demonstrator=demonstrator)
        return chosen, drawn

    chosen, drawn = run(5)
    for epoch in (chosen[:3], chosen[3:]):
        assert sorted(number for batch in epoch for number in batch) == list(range(6))
    assert len(set(drawn)) == 6
    assert run(5) == (chosen, drawn)
    assert run(6)[0] != chosen


def test_objectives_add_up_and_factors_of_0_vanish(model: BertForMaskedLM, scorer: MaskScorer) -> None:
    class Never(Objective):
        def __call__(self, step: Step) -> torch.Tensor:
            raise AssertionError("a term without weight was computed")

    begun = state(model)

    def trained(objective: Objective) -> Fit:
        model.load_state_dict(begun)
        return fit(model, scorer, ROWS, LABELS, recipe=RECIPE, objective=objective)

    plain = trained(CrossEntropy()).losses
    assert trained(1 * CrossEntropy() + 0 * Never()).losses == plain
    halves = trained(0.5 * CrossEntropy() + 0.25 * (CrossEntropy() + CrossEntropy())).losses
    assert halves == pytest.approx(plain, rel=1e-4)  # sums round differently, and seven steps carry it on
    assert trained(2 * CrossEntropy()).losses[0] == pytest.approx(2 * plain[0], rel=1e-6)


def test_probabilities_are_targets_too(model: BertForMaskedLM, scorer: MaskScorer) -> None:
    hot = torch.tensor([[0.0, 1.0], [1.0, 0.0]] * 3)
    begun = state(model)
    by_name = fit(model, scorer, ROWS, LABELS, recipe=RECIPE).losses
    model.load_state_dict(begun)
    assert fit(model, scorer, ROWS, hot, recipe=RECIPE).losses == pytest.approx(by_name, rel=1e-5)


def test_distillation_is_0_at_the_teacher_and_keeps_the_gradients_scale() -> None:
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 3, generator=draw)

    def loss_and_gradient(student: torch.Tensor, temperature: float) -> tuple[float, torch.Tensor]:
        student = student.clone().requires_grad_()
        step: Any = Step(None, None, [], {}, teacher.softmax(-1), draw)  # type: ignore[arg-type]
        step._scores = student
        loss = Distillation(temperature)(step)
        loss.backward()
        assert student.grad is not None
        return loss.item(), student.grad

    for temperature in (1.0, 2.0, 5.0):
        loss, gradient = loss_and_gradient(teacher + 3.0, temperature)
        assert loss == pytest.approx(0, abs=1e-5)
        assert gradient.abs().max() < 1e-5
    sizes = [loss_and_gradient(torch.zeros(4, 3), temperature)[1].norm().item() for temperature in (50.0, 100.0)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)  # the limit for large T, where the loss is quadratic


def test_a_loss_that_is_no_number_ends_the_training(model: BertForMaskedLM, scorer: MaskScorer) -> None:
    class Broken(Objective):
        def __call__(self, step: Step) -> torch.Tensor:
            return step.scores.sum() * float("nan" if step.number == 2 else 1)

    model.eval()
    with pytest.raises(TrainingError, match=r"became nan at step 3 of 7: lower the learning rate"):
        fit(model, scorer, ROWS, LABELS, recipe=RECIPE, objective=Broken())
    assert not model.training


def test_a_step_that_failed_leaves_no_gradient_to_the_next_training(model: BertForMaskedLM, scorer: MaskScorer) -> None:
    """Neither that of a loss that is no number, nor one of the caller's own."""

    class Broken(Objective):
        def __call__(self, step: Step) -> torch.Tensor:
            return step.scores.sum() * float("nan")

    begun = state(model)
    clean = fit(model, scorer, ROWS, LABELS, recipe=RECIPE).losses
    model.load_state_dict(begun)
    with pytest.raises(TrainingError):
        fit(model, scorer, ROWS, LABELS, recipe=RECIPE, objective=Broken())
    assert all(parameter.grad is None for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 9.0) if parameter.requires_grad else None
    assert fit(model, scorer, ROWS, LABELS, recipe=RECIPE).losses == clean


def test_each_modules_own_mode_stays(model: BertForMaskedLM, scorer: MaskScorer) -> None:
    model.train()
    model.bert.embeddings.eval()
    flags = [module.training for module in model.modules()]
    fit(model, scorer, ROWS, LABELS, recipe=Recipe(steps=1))
    assert [module.training for module in model.modules()] == flags
    assert len(set(flags)) == 2


def test_objectives_that_cannot_be_meant_and_labels_that_nobody_knows(
    model: BertForMaskedLM, scorer: MaskScorer
) -> None:
    with pytest.raises(DataError, match="the label 'post'; did you mean 'pos'"):
        fit(model, scorer, ROWS[:2], ["neg", "post"], recipe=RECIPE)
    with pytest.raises(ConfigError, match="has the factor 0"):
        fit(model, scorer, ROWS, LABELS, recipe=RECIPE, objective=0 * CrossEntropy())
    with pytest.raises(ConfigError, match="the targets are labels"):
        fit(model, scorer, ROWS[:2], LABELS[:2], recipe=RECIPE, objective=Distillation())


def test_what_cannot_be_trained_is_an_error(model: BertForMaskedLM, scorer: MaskScorer) -> None:
    with pytest.raises(ConfigError, match="no rows"):
        fit(model, scorer, [], [])
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing of the model is trainable"):
        fit(model, scorer, ROWS, LABELS)
    for wrong in ({"steps": -1}, {"batch_size": 0}, {"steps": True}, {"learning_rate": float("nan")},
                  {"learning_rate": "1e-3"}, {"rates": {"full": "1e-3"}}, {"clip": 0.0}, {"clip": None},
                  {"warmup": 1.5}, {"warmup": -0.1}, {"weight_decay": -0.01}, {"rates": "full"}):  # fmt: skip
        with pytest.raises(ConfigError, match="full" if "rates" in wrong else str(*wrong)):
            Recipe(**wrong)
    assert Recipe(clip=float("inf"), warmup=1, weight_decay=0).warmup == 1
