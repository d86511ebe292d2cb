"""BitFit: the paper's counts, what counts as a bias, and models that have none."""

from __future__ import annotations

import pytest
import torch
import transformers
from engine.tiny import build, build_transformer_encoder
from torch import nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import TargetError, UnsupportedError

BitFit = inlay.BitFit


def trained(model: nn.Module) -> set[str]:
    """What is trained, by the name of the base's parameter."""
    return {site.name for site, _ in adapters_of(model).get("default").pieces()}


@pytest.mark.parametrize(
    ("method", "count"),
    [(BitFit(), 102_912), (BitFit(exclude="pooler"), 102_912 - 768), (BitFit(targets="query,up"), 46_080)],
)
def test_counts_of_the_paper(method: BitFit, count: int) -> None:
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
    assert inlay.summary(inlay.attach(model, method)).trainable_parameters == count


def test_exactly_the_biases_learn() -> None:
    model = build("bert")
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    inlay.attach(model, BitFit())
    assert trained(model) == biases


def test_a_new_head_is_trained_whole() -> None:
    model = inlay.attach(build("bert", "sequence"), BitFit())
    copied, whole = adapters_of(model).get("default").placed
    assert "classifier.bias" not in {site.name for site, _ in copied}
    assert {site.name for site, _ in whole} == {"classifier.weight", "classifier.bias"}


def test_other_spellings_of_a_bias() -> None:
    model = inlay.attach(build_transformer_encoder(), BitFit(layers=0))
    assert {"layers.0.self_attn.in_proj_bias", "layers.0.self_attn.out_proj.bias"} <= trained(model)


def test_a_tied_bias_is_one_parameter() -> None:
    model = inlay.attach(build("bert", "masked"), BitFit(targets="lm_head"))
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_a_model_without_biases() -> None:
    model = build("llama", "causal")
    with pytest.raises(UnsupportedError, match="no place in LlamaForCausalLM has a bias; add_missing=True"):
        inlay.attach(model, BitFit())
    x = torch.arange(3, 13)[None]
    base = model(x).logits
    inlay.attach(model, BitFit(add_missing=True))
    assert inlay.summary(model).trainable_parameters == 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert torch.equal(model(x).logits, base)
    assert not any(name.startswith("lm_head") for name in trained(model))


def test_a_target_without_biases_among_others_that_have_some() -> None:
    model = build("qwen2")  # biases on query, key and value, none on the output
    with pytest.raises(UnsupportedError, match="nothing that 'output' names"):
        inlay.attach(model, BitFit(targets="query,output"))
    inlay.attach(model, BitFit(targets="query,output", add_missing=True))
    assert trained(model) == {
        *(f"layers.{i}.self_attn.q_proj.bias" for i in (0, 1)),
        *(f"layers.{i}.self_attn.o_proj" for i in (0, 1)),
    }


def test_an_added_bias_adds_and_merges() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 2, 1, bias=False)).eval()
    x = torch.randn(5, 3)
    inlay.attach(model, BitFit(add_missing=True))
    first, second = adapters_of(model).get("default").parameters()
    with torch.no_grad():
        first.normal_()
        second.normal_()
    w1, w2 = model[0].weight, model[2].weight[..., 0]
    expected = ((x @ w1.T + first) @ w2.T + second)[..., None]
    # atol: sums of a few products of order 1
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    inlay.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    inlay.unmerge(model)
    assert model[0].bias is None


def test_names_are_checked() -> None:
    with pytest.raises(TargetError, match="did you mean 'query'"):
        inlay.attach(build("bert"), BitFit(targets="qury"))
    model = inlay.attach(build("bert"), BitFit(targets=["query.bias", "re:.*LayerNorm[.].*"], layers=0))
    assert trained(model) == {
        "encoder.layer.0.attention.self.query.bias",
        "encoder.layer.0.attention.output.LayerNorm.bias",
        "encoder.layer.0.output.LayerNorm.bias",
    }
