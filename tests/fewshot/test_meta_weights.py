"""Meta weights: the closed form is the unrolled step, weights are shares, and a wrong pseudo-label counts nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fewshot import toys
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

import inlay
from inlay.errors import ConfigError
from inlay.fewshot.learning.fitting import Recipe, fit
from inlay.fewshot.learning.meta_weights import MetaWeighted, Way, divergences, gains, normalised
from inlay.fewshot.learning.objectives import Distillation, Step
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.mask import MaskScorer

TEXTS = ["a good film", "bad film", "great movie", "the awful movie", "it was fine", "terrible news"]
ROWS = [{"text": text} for text in TEXTS]
LABELS = ["pos", "neg", "pos", "neg", "pos", "neg"]


@pytest.fixture
def scorer(tokenizer: PreTrainedTokenizerFast) -> MaskScorer:
    return MaskScorer(
        tokenizer=tokenizer, template=Template("{text} is {mask}"), verbalizer=Verbalizer({"neg": "no", "pos": "yes"})
    )


def adapted(model: BertForMaskedLM, *methods: inlay.engine.piece.Method) -> BertForMaskedLM:
    """The model with these methods, every trainable tensor moved away from its start."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        inlay.attach(model, list(methods or [inlay.Adapter(placement="houlsby", bottleneck=4, train_norms=False)]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def unrolled(model: nn.Module, losses: Callable[[], Tensor], loss: Callable[[], Tensor], rate: float) -> Tensor:
    """−∂ loss(θ − rate · ∇ Σ ε_i losses_i) / ∂ ε at ε = 0, over rate: the step itself, differentiated twice."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return loss()

    each = losses()
    epsilon = torch.zeros_like(each, requires_grad=True)
    slopes = torch.autograd.grad((epsilon * each).sum(), list(named.values()), create_graph=True)
    moved = {
        f"model.{name}": parameter - rate * slope
        for (name, parameter), slope in zip(named.items(), slopes, strict=True)
    }
    after = functional_call(Asked(), moved, ())
    return -torch.autograd.grad(after, epsilon)[0] / rate


@pytest.mark.parametrize("rate", [5e-6, 1e-2])
def test_the_closed_form_is_the_unrolled_step_in_double_precision(rate: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, soft, true = torch.randn(6, 4).double(), torch.rand(6, 3).double().softmax(-1), torch.tensor([0, 2, 1])
    labelled = torch.randn(3, 4).double()

    def losses() -> Tensor:
        return divergences(model(x), soft)

    def loss() -> Tensor:
        return functional.cross_entropy(model(labelled), true)

    exact, close = (gains(model, losses, loss, way) for way in ("forward", "difference"))
    expected = unrolled(model.eval(), losses, loss, rate)
    assert (exact - expected).abs().max() < 1e-10
    # A central difference is wrong by the square of its step, about (6e-6)² of third derivatives.
    assert (close - expected).abs().max() < 1e-7
    assert (expected.max() - expected.min()) > 1e-2


@pytest.mark.parametrize("way", ["forward", "difference"])
def test_an_adapter_in_a_language_model_gives_the_same(bert: BertForMaskedLM, scorer: MaskScorer, way: Way) -> None:
    model = adapted(bert.double())
    batch, targets = scorer.collate(scorer.encode(ROWS)), torch.tensor([1, 0] * 3)

    def scores() -> Tensor:
        return model(batch["input_ids"], batch["attention_mask"]).logits[:, -2, :3]  # in double precision throughout

    def losses() -> Tensor:
        return divergences(scores(), targets)

    def loss() -> Tensor:
        return functional.cross_entropy(scores()[:2], targets[:2])

    found = gains(model.train(), losses, loss, way)  # dropout is off in spite of train mode
    assert model.training
    trained = [parameter for parameter in model.eval().parameters() if parameter.requires_grad]
    g = torch.autograd.grad(loss(), trained)
    each = [torch.autograd.grad(one, trained, retain_graph=True) for one in losses()]
    expected = torch.stack([sum((a * b).sum() for a, b in zip(g, own, strict=True)) for own in each])
    assert (found - expected).abs().max() < (1e-10 if way == "forward" else 1e-6) * expected.abs().max().clamp_min(1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_lstm_is_measured_by_differences(bert: BertForMaskedLM, scorer: MaskScorer) -> None:
    model = adapted(bert, inlay.PTuning(num_virtual_tokens=2, encoder="lstm", hidden_size=4))
    batch, targets = scorer.collate(scorer.encode(ROWS)), torch.tensor([1, 0] * 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def losses() -> Tensor:
        return divergences(scorer(model, batch), targets)

    found, asked = (gains(model, losses, lambda: losses().mean(), way) for way in (None, "difference"))
    assert torch.equal(found, asked)
    assert found.abs().max() > 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_has_no_forward_mode_is_measured_by_differences() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, slope):  # type: ignore[no-untyped-def]
            return 2 * ctx.saved_tensors[0] * slope

    model = nn.Linear(2, 1, bias=False).double()
    x = torch.eye(2).double()

    def losses() -> Tensor:
        return Square.apply(model(x))[:, 0]  # type: ignore[no-any-return]

    expected = [(2 * w) ** 2 for w in model.weight[0].tolist()]  # ∇ l_i = 2 w_i e_i, and the sum's is 2 w
    assert gains(model, losses, lambda: losses().sum()).tolist() == pytest.approx(expected, rel=1e-7)
    with pytest.raises(RuntimeError):
        gains(model, losses, lambda: losses().sum(), "forward")


def test_weights_are_shares_or_all_nothing() -> None:
    found = normalised(torch.tensor([3.0, -1.0, 1.0, 0.0]))
    assert found.tolist() == pytest.approx([0.75, 0, 0.25, 0], abs=1e-6)
    assert found.sum() == pytest.approx(1, abs=1e-6)
    assert normalised(torch.tensor([-1.0, -2.0])).tolist() == [0, 0]


def step(model: BertForMaskedLM, scorer: MaskScorer, targets: Tensor, number: int) -> Step:
    encoded = scorer.encode(ROWS)
    return Step(model, scorer, encoded, scorer.collate(encoded), targets, torch.Generator().manual_seed(3), number)


def test_in_single_precision_both_ways_agree(bert: BertForMaskedLM, scorer: MaskScorer) -> None:
    model = adapted(bert, inlay.FullFineTuning())  # 30,000 numbers, along whose gradient the loss bends quickly
    batch, targets = scorer.collate(scorer.encode(ROWS)), torch.tensor([0, 1] * 3)

    def losses() -> Tensor:
        return divergences(scorer(model, batch), targets)

    def loss() -> Tensor:
        return losses()[:3].mean()

    exact, close = (gains(model, losses, loss, way) for way in ("forward", "difference"))
    # The step changes the loss by 0.005: rounding of about 1e-7 over that, and its square times a third derivative.
    assert (close - exact).abs().max() < 1e-2 * exact.abs().max()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_differences_on_a_base_in_bfloat16(seed: int, tokenizer: PreTrainedTokenizerFast, scorer: MaskScorer) -> None:
    batch, targets = scorer.collate(scorer.encode(ROWS)), torch.tensor([0, 1] * 3)
    found = []
    for dtype, way in ((torch.float32, "forward"), (torch.bfloat16, "difference")):
        model = toys.tiny_bert(len(tokenizer), seed=seed).to(dtype)  # type: ignore[arg-type]
        torch.manual_seed(1)
        inlay.attach(model, inlay.LoRA(r=4))
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.02)

        def losses(model: Any = model) -> Tensor:
            return divergences(scorer(model, batch), targets)

        found.append(gains(model, losses, lambda losses=losses: losses()[:3].mean(), way))  # type: ignore[misc,arg-type]
    # The loss changes by 0.2, the cube root of bfloat16's epsilon: rounding and the third derivative each leave a few
    # percent. With the step that is right for the adapter's own float32 rounding is larger than the change itself.
    assert functional.cosine_similarity(found[0], found[1], dim=0) > 0.95


def test_a_flipped_pseudo_label_counts_nothing(tokenizer: PreTrainedTokenizerFast, scorer: MaskScorer) -> None:
    model = toys.tiny_bert(len(tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inlay.attach(model, inlay.FullFineTuning())
    fit(model, scorer, ROWS, LABELS, recipe=Recipe(steps=8, batch_size=6, learning_rate=1e-3))  # decent, not certain
    right = torch.tensor([1, 0] * 3)
    assert (scorer.scores(model, ROWS).argmax(-1) == right).all()
    soft = functional.one_hot(right, 2) * 0.9 + 0.05
    flipped = soft.clone()
    flipped[0] = soft[0].flip(0)
    objective = MetaWeighted(ROWS, LABELS, uniform_steps=0, size=6)
    before, after = (objective.weights(step(model, scorer, targets, 0)) for targets in (soft, flipped))
    assert before[0] > 0
    assert after[0] == 0
    assert (after >= 0).all()
    assert after.sum() == pytest.approx(1, abs=1e-4)


def test_uniform_up_to_the_warm_ups_last_step_and_meta_weights_from_the_next(
    bert: BertForMaskedLM, scorer: MaskScorer
) -> None:
    objective = MetaWeighted(ROWS, LABELS, uniform_steps=3, threshold=0.6)
    model, sure = adapted(bert), torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.1, 0.9]])
    uniform = torch.tensor([0.25, 0, 0.25, 0, 0.25, 0.25])  # of the six two are not surer than 0.6
    for number in (0, 2):
        assert torch.equal(objective.weights(step(model, scorer, sure, number)), uniform)
    at, behind = (objective.weights(step(model, scorer, sure, number)) for number in (3, 4))
    assert torch.equal(at, behind)
    assert not torch.allclose(at, uniform)
    none = torch.full((6, 2), 0.5)
    assert objective.weights(step(model, scorer, none, 0)).tolist() == [0] * 6


def test_uniform_weights_are_plain_self_training(tokenizer: PreTrainedTokenizerFast, scorer: MaskScorer) -> None:
    soft = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)).softmax(-1)
    recipe, losses = Recipe(steps=5, batch_size=4, learning_rate=0.01), list[list[float]]()
    for objective in (MetaWeighted(ROWS, LABELS, uniform_steps=5), Distillation(1.0)):
        model = adapted(toys.tiny_bert(len(tokenizer)))
        losses.append(fit(model, scorer, ROWS, soft, objective=objective, recipe=recipe).losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # rounding: a sum over rows in another order


def test_a_step_with_meta_weights_can_be_gone_back_through_and_is_the_same_again(
    tokenizer: PreTrainedTokenizerFast, scorer: MaskScorer
) -> None:
    soft = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)).softmax(-1)
    losses = []
    for way in ("forward", "forward", "difference"):
        model = adapted(toys.tiny_bert(len(tokenizer)))
        objective = MetaWeighted(ROWS, LABELS, uniform_steps=2, way=way)
        recipe = Recipe(steps=5, batch_size=4, learning_rate=1e-3)
        losses.append(fit(model, scorer, ROWS, soft, objective=objective, recipe=recipe).losses)
    assert losses[0] == losses[1]
    assert losses[0][:2] == losses[2][:2]
    assert losses[0] == pytest.approx(losses[2], abs=1e-3)  # differences in single precision


def test_no_labelled_rows_is_an_error() -> None:
    with pytest.raises(ConfigError, match="labelled rows"):
        MetaWeighted([], [], uniform_steps=0)
