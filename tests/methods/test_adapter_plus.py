"""Adapter+: the formula on a block, the paper's count, and stochastic depth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from engine.tiny import build
from torch import nn

import inlay
from inlay import AdapterPlus
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.bottlenecks.scaled import ScaledBottleneck


def randomise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def networks(model: nn.Module) -> list[ScaledBottleneck]:
    return [module for module in model.modules() if isinstance(module, ScaledBottleneck)]


@pytest.mark.parametrize("name", ["vit", "t5"])
def test_it_follows_the_last_residual_addition(name: str) -> None:
    model, x = build(name), torch.randn(2, 5, 32)
    block = model.layers[0] if name == "vit" else model.encoder.block[0]
    first = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    base = first(block(x))
    randomise(inlay.attach(model, AdapterPlus(layers=0)))
    (a, *_) = networks(block)
    hidden = F.gelu(base @ a.down.weight.T + a.down.bias)
    expected = base + a.gain * (hidden @ a.up.weight.T + a.up.bias)
    torch.testing.assert_close(first(block(x)), expected, rtol=1e-5, atol=1e-5)


def test_the_count_on_vit_base() -> None:
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)
    inlay.attach(model, AdapterPlus())
    assert inlay.summary(model).trainable_parameters == 12 * (2 * 8 * 768 + 8 + 2 * 768) == 165_984


def test_stochastic_depth_grows_with_the_block_and_keeps_the_mean() -> None:
    model = randomise(inlay.attach(build("vit"), AdapterPlus(drop_path=0.4)))
    first, last = networks(model)
    x, z = torch.randn(4000, 1, 32), torch.randn(1, 1, 8).expand(4000, 1, 8)
    whole = last.eval().widen(z)
    assert torch.equal(first.train().widen(z), first.eval().widen(z))
    found = last.train().widen(z)
    left_out = (found == 0).all(-1).all(-1)
    assert abs(left_out.float().mean() - 0.4) < 0.04  # five standard deviations of 4,000 draws
    torch.testing.assert_close(found[~left_out], whole[~left_out] / 0.6)
    assert x.shape == last(x).shape


def test_what_cannot_be_is_refused_before_anything_is_changed() -> None:
    for fields, words in (({"drop_path": 1.0}, r"AdapterPlus\(drop_path"), ({"bottleneck": 0}, r"AdapterPlus\(bott")):
        with pytest.raises(ConfigError, match=words):
            AdapterPlus(**fields)
    model = build("bert")
    with pytest.raises(UnsupportedError, match="AdapterPlus: the width"):
        inlay.attach(model, AdapterPlus(targets="self_attention"))
    assert not hasattr(model, "_inlay")
