"""DensityLoss and `inlay.density`: padding, both stacks, checkpoints, files, gates, and what stays alive."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine.tiny import build
from properties.models import snapshot
from torch import Tensor, nn

import inlay
from inlay import DensityLoss, LoRA
from inlay.errors import ConfigError, TargetError, UnsupportedError

T5: dict[str, Any] = {"dropout_rate": 0.0}
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks for it
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def text(length: int = 6, padding: int = 0) -> dict[str, Tensor]:
    """Two texts, and so much padding after them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (2, length), generator=generator)
    ids = torch.cat([ids, torch.ones(2, padding, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(2, length), torch.zeros(2, padding)], 1).long()
    return {"input_ids": ids, "attention_mask": mask}


def bert(activation: str = "relu", **changes: Any) -> nn.Module:
    return build("bert", hidden_act=activation, **QUIET, **changes)


def term(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    model(**inputs)
    (controller,) = inlay.controllers(model)
    found = controller.extra_loss()
    assert found is not None
    return found


def activations(model: nn.Module, inputs: dict[str, Tensor], names: str) -> dict[str, Tensor]:
    """What goes into the second projections, by plain hooks."""
    seen: dict[str, Tensor] = {}
    places = [(name, module) for name, module in model.named_modules() if name.endswith(names)]
    hooks = [m.register_forward_pre_hook(lambda _, x, n=n: seen.__setitem__(n, x[0])) for n, m in places]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_loss_and_its_gradient_are_the_formulas() -> None:
    torch.manual_seed(0)
    model = inlay.attach(bert(), [LoRA(r=2, targets="attention,up"), DensityLoss(weight=0.7, eps=1e-2)])
    inputs = text(padding=2)
    found = term(model, inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(found, trained, allow_unused=True)
    mask = inputs["attention_mask"].bool()
    seen = [a[mask] for name, a in activations(model, inputs, "output.dense").items() if "attention" not in name]
    expected = 0.7 * torch.stack([(a**2 / (a**2 + 1e-2)).mean() for a in seen]).mean()
    assert len(seen) == 2
    torch.testing.assert_close(found, expected)
    for own, other in zip(gradients, torch.autograd.grad(expected, trained, allow_unused=True), strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-7)


def test_padding_does_not_count() -> None:
    model = inlay.attach(bert(), [LoRA(r=2), DensityLoss(eps=1e-2)])
    torch.testing.assert_close(term(model, text()), term(model, text(padding=5)))
    short, long = inlay.density(model, text()), inlay.density(model, text(padding=5))
    assert (short.nonzero, short.total) == (long.nonzero, long.total)
    bare = {"input_ids": text(padding=5)["input_ids"]}
    assert inlay.density(model, bare).total > long.total


@pytest.mark.parametrize("how", ["labels", "decoder_attention_mask"])
def test_both_stacks_have_masks_of_their_own_and_are_summed(how: str) -> None:
    model = inlay.attach(build("t5", "conditional", **T5), [LoRA(r=2), DensityLoss(eps=1e-2)])
    labels = torch.randint(3, 60, (2, 4), generator=torch.Generator().manual_seed(1))
    short = {**text(), "labels": labels}
    padded = torch.cat([labels, torch.full((2, 3), -100)], 1)
    if how == "decoder_attention_mask":
        visible = (padded != -100).long()
        long = {**text(padding=2), "decoder_input_ids": padded.clamp(min=0), "decoder_attention_mask": visible}
        short = {**text(), "decoder_input_ids": labels}
    else:
        long = {**text(padding=2), "labels": padded}
    torch.testing.assert_close(term(model, short), term(model, long))
    model(**short)
    names = activations(model, short, "DenseReluDense.wo")
    means = {
        stack: torch.stack([(a**2 / (a**2 + 1e-2)).mean() for name, a in names.items() if name.startswith(stack)])
        for stack in ("encoder", "decoder")
    }
    torch.testing.assert_close(term(model, short), means["encoder"].mean() + means["decoder"].mean())


def test_virtual_tokens_count_and_a_mask_of_another_kind_is_refused() -> None:
    methods = [inlay.PromptTuning(num_virtual_tokens=3), DensityLoss(eps=1e-2)]
    model = inlay.attach(build("llama", "causal"), methods)
    short, long = text(), text(padding=2)
    torch.testing.assert_close(term(model, short), term(model, long))
    model = inlay.attach(bert(), [LoRA(r=2), DensityLoss()])
    with pytest.raises(UnsupportedError, match="not one for each query"):
        model(input_ids=short["input_ids"], attention_mask=torch.zeros(2, 1, 6, 6))


def test_networks_that_are_not_computed_count_as_constant() -> None:
    """As where the lower blocks' states come from a cache: gradients stay what they were."""
    model = inlay.attach(bert(), [LoRA(r=2, targets="up", layers=1), DensityLoss(eps=1e-2)])
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = torch.autograd.grad(term(model, text()), trained)
    model(**text())
    (controller,) = inlay.controllers(model)
    del controller.watch.terms[0]
    found = torch.autograd.grad(controller.extra_loss(), trained)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)


def test_shared_blocks_count_at_each_call() -> None:
    model = build("albert", hidden_act="relu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inlay.attach(model, [LoRA(r=2), DensityLoss(eps=1e-2)])
    seen: list[Tensor] = []
    (place,) = (module for name, module in model.named_modules() if name.endswith("ffn_output"))
    place.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    found = term(model, text())
    assert len(seen) == 2
    torch.testing.assert_close(found, torch.stack([(a**2 / (a**2 + 1e-2)).mean() for a in seen]).mean())


def test_nothing_stays_alive_between_steps() -> None:
    model = inlay.attach(bert(), [LoRA(r=2, targets="up"), DensityLoss()])
    (controller,) = inlay.controllers(model)
    model(**text())
    seen = weakref.ref(controller.watch.terms[0][1])
    found = controller.extra_loss()
    found.backward()
    del found
    gc.collect()
    assert seen() is None
    model(**text())  # nobody asks for this one's term: the next forward pass lets it go
    dropped = weakref.ref(controller.watch.terms[0][1])
    with torch.no_grad():
        model(**text())
    assert dropped() is None
    assert controller.extra_loss() is None
    model(**text())
    copy.deepcopy(model)(**text())  # terms are no part of a copy, whose graph could not be copied


def test_checkpointed_blocks_give_the_same_gradient_or_a_clear_refusal() -> None:
    def gradients(reentrant: bool | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = inlay.attach(bert(), [LoRA(r=2, targets="up"), DensityLoss(eps=1e-2)]).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if reentrant is not None:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(**text(padding=2)).last_hidden_state.square().mean()
        (controller,) = inlay.controllers(model)
        extra = controller.extra_loss()
        assert extra is not None
        (loss + extra).backward()
        assert controller.watch.terms == []  # what is computed again adds nothing
        return [p.grad for p in model.parameters() if p.grad is not None]

    model = inlay.attach(bert(), [LoRA(r=2, targets="up"), DensityLoss()]).train()
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.enable_input_require_grads()
    first = model(**text(padding=2)).last_hidden_state.sum()
    other = {name: value[:1] for name, value in text().items()}
    (first + model(**{name: value.repeat(3, 1) for name, value in other.items()}).last_hidden_state.sum()).backward()
    for found, expected in zip(gradients(False), gradients(None), strict=True):
        torch.testing.assert_close(found, expected)
    with pytest.raises(UnsupportedError, match="use_reentrant"):
        gradients(True)


def test_density_falls_while_the_task_is_learnt() -> None:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("linear1", nn.Linear(6, 40))
    net.add_module("act", nn.ReLU())
    net.add_module("linear2", nn.Linear(40, 1))
    x = torch.randn(64, 6)
    target = x[:, :1]

    def trained(*more: Any) -> tuple[float, float]:
        model = inlay.attach(copy.deepcopy(net), [LoRA(r=6, targets="linear1,linear2", init="kaiming"), *more])
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(100):
            loss = (model(x) - target).square().mean()
            extra = [c.extra_loss() for c in inlay.controllers(model)]
            optimizer.zero_grad()
            sum(extra, loss).backward()
            optimizer.step()
        return loss.item(), inlay.density(model, {"input": x}, targets="linear2").exact

    before = inlay.density(net, {"input": x}, targets="linear2").exact
    loss, dense = trained()
    sparse_loss, sparse = trained(DensityLoss(targets="linear2", weight=0.5, eps=1e-2))
    assert before > 0.4
    assert sparse < 0.75 * min(dense, before)
    assert sparse_loss < 0.1 * float(target.square().mean())
    assert loss < sparse_loss  # nothing is free


def test_squared_relu_is_measured_too() -> None:
    model = bert("relu2")
    seen = activations(model, text(), "output.dense")
    seen = {name: a for name, a in seen.items() if "attention" not in name}
    found = inlay.density(model, [text(), text()], threshold=1e-3)
    assert found.exact == pytest.approx(float(torch.stack([(a > 0).double().mean() for a in seen.values()]).mean()))
    assert found.thresholded == pytest.approx(
        float(torch.stack([(a >= 1e-3).double().mean() for a in seen.values()]).mean())
    )
    assert list(found.places) == list(seen)
    assert "all" in str(found)
    assert inlay.density(bert("gelu"), text()).exact > 0.99  # which is why there is a threshold


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = bert().train()
    model.pooler.eval()
    before = snapshot(model)
    inlay.density(model, text())
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="input_ids"):
        inlay.density(model, {"nonsense": 1})
    assert snapshot(model) == before
    with pytest.raises(ConfigError, match="no data"):
        inlay.density(model, [])
    with pytest.raises(ConfigError, match="threshold=0"):
        inlay.density(model, text(), threshold=0)


def test_gates_that_closed_leave_the_network_out() -> None:
    model = inlay.attach(build("llama", "causal"), DensityLoss(adaptive=True, skip_below=0.2))
    first, second = (p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        first.fill_(0.1)
        second.fill_(-0.5)
    calls: list[str] = []
    layers = model.model.layers
    base = build("llama", "causal")
    base.model.layers[0].mlp.down_proj.weight.data.zero_()
    base.model.layers[1].mlp.down_proj.weight.data.mul_(-0.5)
    with torch.no_grad():
        expected, found = base(**text()).logits, model(**text()).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    shares = inlay.density(model, text())
    assert shares.places["model.layers.0.mlp.down_proj"].exact == 0
    assert shares.places["model.layers.1.mlp.down_proj"].exact > 0
    for name in ("gate_proj", "up_proj", "down_proj"):
        inner = layers[0].mlp.get_submodule(name).inlays.call().inner
        inner.base = lambda *_, name=name: calls.append(name)
    with torch.no_grad():
        model(**text())
    assert calls == []  # none of the three products was computed
    model.train()
    with torch.no_grad():
        assert not torch.allclose(layers[1].mlp(torch.ones(1, 2, 32)), torch.zeros(()))
    inlay.merge(model.eval().requires_grad_(False))
    with torch.no_grad():
        torch.testing.assert_close(model(**text()).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_gate_weighs_its_networks_part_of_the_loss() -> None:
    model = inlay.attach(bert(), DensityLoss(adaptive=True, eps=1e-2))
    gates = [p for p in model.parameters() if p.requires_grad]
    plain = inlay.attach(bert(), [LoRA(r=2), DensityLoss(eps=1e-2)])
    torch.testing.assert_close(term(model, text()), term(plain, text()))
    with torch.no_grad():
        gates[1].fill_(-0.25)
    model(**text())
    parts = [value.item() for _, value in inlay.controllers(model)[0].watch.terms]
    plain(**text())
    whole = [value.item() for _, value in inlay.controllers(plain)[0].watch.terms]
    assert parts == pytest.approx([whole[0], 0.25 * whole[1]], rel=1e-5)
    (gradient,) = torch.autograd.grad(term(model, text()), gates[1])
    assert float(gradient) == pytest.approx(-whole[1] / 2, rel=1e-5)


def test_beside_a_method_that_peft_has_the_file_is_pefts(tmp_path: Path) -> None:
    model = inlay.attach(bert(), [LoRA(r=2), DensityLoss(weight=0.3)])
    inlay.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    peft.PeftModel.from_pretrained(bert(), tmp_path)
    loaded = inlay.load(bert(), tmp_path, trainable=True)
    assert torch.equal(term(loaded, text()), term(model, text()))
    inlay.merge(loaded)
    inlay.unmerge(loaded)
    both = inlay.attach(bert(), [LoRA(r=2), DensityLoss(adaptive=True)])
    inlay.save(both, tmp_path / "gates")
    assert torch.equal(term(inlay.load(bert(), tmp_path / "gates", trainable=True), text()), term(both, text()))


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"weight": -1.0}, ConfigError, "weight=-1.0"),
        ({"eps": 0}, ConfigError, "eps=0"),
        ({"eps": "x"}, ConfigError, "eps='x'"),
        ({"overrides": {"a": {"eps": 1.0}}}, ConfigError, "leave overrides out"),
        ({}, ConfigError, "DensityLoss has nothing to train"),
        ({"targets": "embed"}, TargetError, "embed"),
    ],
)
def test_refusals(fields: dict[str, Any], error: type[Exception], said: str) -> None:
    model = bert()
    before = snapshot(model)
    with pytest.raises(error, match=said):
        inlay.attach(model, DensityLoss(**fields))
    assert snapshot(model) == before
