"""LayerNorm tuning: every kind of norm, and nothing else."""

from __future__ import annotations

import pytest
import torch
import transformers
from engine.tiny import build
from torch import nn

import inlay
from inlay.errors import TargetError


def test_bert_base_has_38400_parameters() -> None:
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
    assert inlay.summary(inlay.attach(model, inlay.LayerNormTuning())).trainable_parameters == 25 * 2 * 768 == 38_400


@pytest.mark.parametrize(("name", "count"), [("llama", 5 * 32), ("gpt2", 5 * 64), ("qwen3", 5 * 32 + 4 * 8)])
def test_counts(name: str, count: int) -> None:
    assert inlay.summary(inlay.attach(build(name), inlay.LayerNormTuning())).trainable_parameters == count


def test_formula() -> None:
    model = nn.Sequential(nn.LayerNorm(6)).eval()
    x = torch.randn(4, 6)
    inlay.attach(model, inlay.LayerNormTuning())
    gain, shift = (p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        gain.normal_()
        shift.normal_()
    normal = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model(x), gain * normal + shift, rtol=1e-5, atol=1e-5)  # two orders of summing


def test_batch_and_group_norms() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4, elementwise_affine=False)).eval()
    inlay.attach(model, inlay.LayerNormTuning())
    assert inlay.summary(model).trainable_parameters == 16


def test_roles_of_norms() -> None:
    model = inlay.attach(build("llama"), inlay.LayerNormTuning(targets="attention_norm", layers=[1]))
    assert {path for path, p in model.named_parameters() if p.requires_grad} == {
        "layers.1.input_layernorm.inlays.default.layer_norm_weight.value"
    }


def test_a_place_that_is_no_norm() -> None:
    with pytest.raises(TargetError, match=r"of kind linear.*only norm can be used here"):
        inlay.attach(build("bert"), inlay.LayerNormTuning(targets="query"))
