"""Invertible adapters: the inverse is one, it stands where MAD-X has it, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from engine.tiny import build, build_clip
from torch import nn

import inlay
from inlay import Adapter, InvertibleAdapter
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, TargetError, UnsupportedError
from inlay.pieces.coupling import Coupling

IDS = torch.arange(3, 13).view(2, 5)


def randomise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_the_inverse_is_one_both_ways(width: int, dtype: torch.dtype, digits: float) -> None:
    method = InvertibleAdapter(init="bert", activation="gelu")
    coupling = Coupling(width, method, SimpleNamespace(dtype=torch.float64, device="cpu"))
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.normal_()
    x = torch.randn(3, 4, width, dtype=dtype)
    # What was added is computed again and taken away: one rounding of a sum of a few units for each half.
    for there, back in ((coupling, coupling.inverse), (coupling.inverse, coupling)):
        assert not torch.allclose(there(x), x, atol=0.1)
        assert (back(there(x)) - x).abs().max() <= digits * there(x).abs().max()
    jacobian = torch.autograd.functional.jacobian(coupling, torch.randn(width, dtype=torch.float64))
    assert abs(torch.linalg.det(jacobian)) - 1 < 1e-10  # NICE keeps volumes


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_it_stands_after_the_embeddings_and_before_the_head(name: str) -> None:
    model = build(name, "masked" if name == "bert" else "causal")
    randomise(inlay.attach(model, InvertibleAdapter()))
    blocks = model.bert.encoder.layer if name == "bert" else model.transformer.h
    head = model.cls.predictions.decoder if name == "bert" else model.lm_head
    coupling = next(module for module in model.modules() if isinstance(module, Coupling))
    seen = {}
    blocks[0].register_forward_pre_hook(lambda _, args: seen.update(embedded=args[0]))
    inner = blocks[0].attention if name == "bert" else blocks[0].ln_1
    inner.register_forward_pre_hook(lambda _, args: seen.update(turned=args[0]))
    head.register_forward_hook(lambda _, args, output: seen.update(last=args[0], logits=output))
    model(IDS)
    torch.testing.assert_close(seen["turned"], coupling(seen["embedded"]))
    x1, x2 = seen["embedded"].split(16, -1)
    y1 = x1 + F.relu(x2 @ coupling.f.down.weight.T + coupling.f.down.bias) @ coupling.f.up.weight.T + coupling.f.up.bias
    torch.testing.assert_close(seen["turned"][..., :16], y1, rtol=1e-5, atol=1e-5)
    bias = getattr(head, "bias", None)
    torch.testing.assert_close(seen["logits"], F.linear(coupling.inverse(seen["last"]), head.weight, bias))
    # A model without blocks gives back what it was given: the two undo one another.
    torch.testing.assert_close(coupling.inverse(seen["turned"]), seen["embedded"], rtol=1e-4, atol=1e-5)


def test_both_halves_of_an_encoder_decoder_and_adapters_beside_it(tmp_path: Path) -> None:
    model = build("t5", "conditional")
    with torch.no_grad():  # with gradients, T5's attention takes another kernel once its bias is frozen
        base = model(IDS, decoder_input_ids=IDS).logits
        inlay.attach(model, [InvertibleAdapter(), Adapter(reduction_factor=8)])
        assert torch.equal(model(IDS, decoder_input_ids=IDS).logits, base)
    found = randomise(model)(IDS, decoder_input_ids=IDS).logits
    sites = [site.path for site, _ in adapters_of(model).get("default").placed[0]]
    assert sites == ["encoder.block.0", "decoder.block.0", "lm_head"]
    loaded = inlay.load(build("t5", "conditional"), inlay.save(model, tmp_path))
    assert torch.equal(loaded(IDS, decoder_input_ids=IDS).logits, found)


def test_the_count_of_width_768() -> None:
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(transformers.BertConfig())
    inlay.attach(model, InvertibleAdapter())
    assert inlay.summary(model).trainable_parameters == 296_064


def test_what_cannot_be_is_refused_before_anything_is_changed() -> None:
    for model, error, words in (
        (build("albert"), UnsupportedError, "InvertibleAdapter cannot sit at .* calls it 2 times"),
        (nn.Linear(4, 4), TargetError, "InvertibleAdapter has no place in Linear, where no stack of blocks"),
    ):
        with pytest.raises(error, match=words):
            inlay.attach(model, InvertibleAdapter())
        assert not hasattr(model, "_inlay")
    with pytest.raises(UnsupportedError, match="they differ in width"):
        inlay.attach(build_clip(), InvertibleAdapter())
    with pytest.raises(TargetError, match=r"InvertibleAdapter: targets='query' are 2 places .*: name one"):
        inlay.attach(build("bert"), InvertibleAdapter(targets="query"))
    with pytest.raises(ConfigError, match=r"InvertibleAdapter\(activation='rellu'\).*did you mean 'relu'"):
        InvertibleAdapter(activation="rellu")
    with pytest.raises(ConfigError, match="no layers, no overrides"):
        InvertibleAdapter(layers=0)
    with pytest.raises(ConfigError, match="exclude with targets only"):
        InvertibleAdapter(exclude="0")
