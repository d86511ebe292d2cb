"""What counts as the same base model, and what does not."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from engine import tiny
from torch import nn

import inlay
from inlay.engine.fingerprint import base_parameters, compare, fingerprint
from inlay.errors import BaseModelError


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return tiny.build("llama", "causal")


def stored(model: nn.Module, *without: str) -> Any:
    """A fingerprint as it comes back from a file."""
    return json.loads(json.dumps(fingerprint(model, frozenset(without))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_same_weights_in_another_precision_are_the_same_base(base: nn.Module, dtype: torch.dtype) -> None:
    other = copy.deepcopy(base).to(dtype)
    compare(stored(base), other)
    compare(stored(other), base)


def test_attaching_activating_and_merging_do_not_change_it(base: nn.Module) -> None:
    net = copy.deepcopy(base)
    before = stored(net)
    inlay.attach(net, [inlay.LoRA(r=2, targets="q_proj,embed", init="pissa", exclude="embed"),
                       inlay.LoRA(r=2, targets="v_proj", lora_bias=True)])  # fmt: skip
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "inlays" in name:
                parameter.normal_()
    assert stored(net) == before
    inlay.merge(net)
    assert stored(net) == before
    compare(before, net)
    inlay.unmerge(net)
    assert stored(net) == before


def test_tied_weights_that_merge_apart_are_still_one_parameter() -> None:
    net = tiny.build("gpt2", "causal")
    names = set(base_parameters(net))
    inlay.attach(net, inlay.LoRA(r=2, targets="wte"))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "inlays" in name:
                parameter.normal_()
    inlay.merge(net)
    assert net.lm_head.weight is not net.transformer.wte.weight
    assert set(base_parameters(net)) == names


def test_what_an_adapter_brings_itself_is_left_out() -> None:
    net = tiny.build("bert", "sequence")
    print_ = stored(net, "classifier.weight", "classifier.bias")
    with torch.no_grad():
        net.classifier.weight.normal_()
    compare(print_, net)
    net.classifier = nn.Linear(32, 7)
    compare(print_, net)
    assert "classifier.weight" not in print_["weights"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.config.update({"hidden_size": 64}), "hidden_size is 64 here, 32 there"),
        (lambda net: net.config.update({"model_type": "mistral"}), "model_type is 'mistral' here, 'llama' there"),
        (lambda net: net.resize_token_embeddings(72, mean_resizing=False), "vocab_size is 72 here, 64 there"),
        (lambda net: setattr(net.model.layers[0].mlp, "down_proj", nn.Linear(48, 33)), "down_proj|names or shapes"),
        (lambda net: net.model.register_parameter("more", nn.Parameter(torch.ones(3))), "names or shapes differ"),
        (lambda net: delattr(net.model, "embed_tokens"), "there is no parameter model.embed_tokens.weight here"),
        (lambda net: net.model.embed_tokens.weight.data.mul_(1.1), "the weights of model.embed_tokens.weight differ"),
        (lambda net: [p.data.normal_() for p in net.model.layers[1].parameters()], r"model.layers.1.* differ"),
    ],
)  # fmt: skip
def test_what_differs_is_said(base: nn.Module, change: Any, message: str) -> None:
    known = stored(base)
    net = copy.deepcopy(base)
    change(net)
    with pytest.raises(BaseModelError, match=rf"another base model: .*({message}).*strict=False"):
        compare(known, net)


def test_a_quantised_base_is_told_by_its_config_and_its_other_weights(base: nn.Module) -> None:
    """4-bit weights are packed into another shape, so neither their shapes nor their values can be compared."""
    packed = copy.deepcopy(base)
    for name, module in packed.named_modules():
        if name.endswith("_proj"):
            codes = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
            module.weight = nn.Parameter(codes, requires_grad=False)
    compare(stored(base), packed)
    compare(stored(packed), base)
    assert stored(packed)["shapes"] is None
    other = copy.deepcopy(base)
    other.model.embed_tokens.weight.data.normal_()
    with pytest.raises(BaseModelError, match="embed_tokens"):
        compare(stored(packed), other)


def test_weights_that_are_not_there_yet_are_not_compared(base: nn.Module) -> None:
    with torch.device("meta"):
        empty = type(base)(base.config)
    compare(stored(base), empty)
    assert stored(empty)["weights"] == {}


def test_it_is_small_whatever_the_model() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(100))

    found = fingerprint(Deep())
    assert len(found["weights"]) == 8
    assert len(json.dumps(found)) < 2000
    assert found["parameters"] == 100 * 20
