"""(IA)³: the formula at every kind of place, the paper's count, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from engine.tiny import build, build_transformer_encoder
from torch import nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, TargetError, UnsupportedError

EXACT = {"rtol": 1e-6, "atol": 1e-6}  # the same products, rounded in another order


def only_parameter(model: nn.Module) -> nn.Parameter:
    (parameter,) = adapters_of(model).get("default").parameters()
    return parameter


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("form", ["multiplicative", "additive"])
@pytest.mark.parametrize("place", ["output", "input"])
def test_formula_at_a_linear(form: str, place: str) -> None:
    linear = nn.Linear(4, 6)
    w, b, x = linear.weight.detach().clone(), linear.bias.detach().clone(), torch.randn(3, 4)
    model = nn.Sequential(linear)
    inlay.attach(model, inlay.IA3(targets="0", form=form, feedforward="0" if place == "input" else ()))
    randomise(model)
    vector = only_parameter(model)
    assert vector.shape == ((1, 4) if place == "input" else (6, 1))
    v = vector.flatten()
    act = (lambda t: t + v) if form == "additive" else (lambda t: t * v)
    expected = act(x) @ w.T + b if place == "input" else act(x @ w.T + b)
    torch.testing.assert_close(model(x), expected, **EXACT)


def test_an_ungated_network_is_scaled_between_its_activation_and_its_second_projection() -> None:
    model = build("bert")
    inlay.attach(model, inlay.IA3(targets="down", layers=0))
    randomise(model)
    layer = model.encoder.layer[0]
    x = torch.randn(2, 5, 32)
    w2 = layer.output.dense
    expected = (layer.intermediate(x) * only_parameter(model).flatten()) @ w2.weight.T + w2.bias
    torch.testing.assert_close(w2(layer.intermediate(x)), expected, **EXACT)


def test_t0_3b_has_540672_parameters() -> None:
    config = transformers.T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    inlay.attach(model, inlay.IA3())
    assert inlay.summary(model).trainable_parameters == 24 * (2 * 2048 + 5120) + 24 * (4 * 2048 + 5120) == 540_672


def test_a_fused_projection_is_scaled_whole() -> None:
    model = inlay.attach(build("gpt2"), inlay.IA3(targets="key,value"))
    assert [row.parameters for row in inlay.summary(model).rows] == [2 * 96]


@pytest.mark.parametrize("place", ["output", "input"])
@pytest.mark.parametrize("groups", [1, 2])
def test_merged_convolutions(groups: int, place: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups, padding=1)).eval()
    x = torch.randn(2, 4, 5, 5)
    inlay.attach(model, inlay.IA3(targets="0", feedforward="0" if place == "input" else ()))
    randomise(model)
    expected = model(x)
    assert not torch.allclose(expected, model[0]._conv_forward(x, model[0].weight, model[0].bias))
    inlay.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    inlay.unmerge(model)
    torch.testing.assert_close(model(x[0]), expected[0], rtol=1e-5, atol=1e-5)  # without a batch axis


def test_each_expert_has_a_vector_of_its_own() -> None:
    model = build("mixtral", "causal")
    ids = torch.arange(3, 13)[None]
    inlay.attach(model, inlay.IA3(targets="down", layers=0))
    randomise(model)
    vector = only_parameter(model)
    assert vector.shape == (3, 1, 48)
    with torch.no_grad():
        expected = model(ids).logits
        scale = vector.detach().clone()
        inlay.detach(model)
        model.model.layers[0].mlp.experts.down_proj.mul_(scale)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_adding_to_the_input_cannot_be_merged() -> None:
    model = inlay.attach(build("bert"), inlay.IA3(form="additive"))
    with pytest.raises(UnsupportedError, match="cannot merge"):
        inlay.merge(model)
    inlay.detach(model)
    inlay.merge(inlay.attach(model, inlay.IA3(form="additive", targets="key,value")))


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiplicative, additive"):
        inlay.IA3(form="both")  # type: ignore[arg-type]
    with pytest.raises(TargetError, match=r"feedforward='output.denze' is none of the targets"):
        inlay.attach(build("bert"), inlay.IA3(feedforward="down,output.denze"))
    with pytest.raises(UnsupportedError, match=r"self_attn\.in_proj_weight.*its bias"):
        inlay.attach(build_transformer_encoder(), inlay.IA3(targets="key"))

