"""UniPELT: each gated part by hand, forced gates, padding, and what a decoder is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from engine.tiny import build
from torch import Tensor, nn

import inlay
from inlay import UniPELT
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.bottlenecks.gated import GatedBottleneck, GatedLoRA, GatedPrefix
from inlay.pieces.real_tokens import Gate, real_tokens

SMALL = {"num_virtual_tokens": 3, "projection_size": None, "r": 2, "bottleneck": 4}
IDS = torch.arange(3, 13).view(2, 5)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def attached(model: nn.Module, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    inlay.attach(model, UniPELT(**{**SMALL, **fields}))
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def by_hand(gate: Gate, x: Tensor, mask: Tensor) -> Tensor:
    opened = torch.sigmoid(x @ gate.weight + gate.bias)
    return torch.stack([row[real.bool()].mean() for row, real in zip(opened, mask, strict=True)]).view(-1, 1, 1)


def test_lora_and_the_adapter_by_hand() -> None:
    model = attached(build("bert"), use=("lora", "adapter"), layers=0)
    layer, seen = model.encoder.layer[0], {}
    query = layer.attention.self.query
    query.register_forward_hook(lambda _, x, y: seen.update(x=x[0], y=y))
    layer.output.register_forward_hook(lambda _, x, y: seen.update(h=x[0], residual=x[1], out=y))
    model(IDS, MASK)
    (lora,) = (module for module in query.modules() if isinstance(module, GatedLoRA))
    x = seen["x"]
    expected = F.linear(x, query.weight, query.bias) + by_hand(lora.gate, x, MASK) * (x @ lora.lora_A.T @ lora.lora_B.T)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-5)
    network = next(module for module in layer.output.modules() if isinstance(module, GatedBottleneck))
    norm = layer.output.LayerNorm
    t = F.linear(seen["h"], layer.output.dense.weight, layer.output.dense.bias) + seen["residual"]
    normal = lambda t: F.layer_norm(t, (32,), norm.weight, norm.bias, norm.eps)  # noqa: E731
    up = network.up(F.relu(network.down(normal(t))))
    torch.testing.assert_close(
        seen["out"], normal(t + by_hand(network.gate, normal(t), MASK) * up), rtol=1e-4, atol=1e-5
    )


def test_the_prefix_by_hand() -> None:
    model = attached(build("bert"), use="prefix", layers=0)
    attention: nn.Module = model.encoder.layer[0].attention.self
    (piece,) = (module for module in attention.modules() if isinstance(module, GatedPrefix))
    seen = {}
    attention.register_forward_hook(lambda _, x, y: seen.update(x=x[0], y=y[0]))
    model(IDS, MASK)
    x, gate = seen["x"], by_hand(piece.gate, seen["x"], MASK).unsqueeze(-1)
    heads = lambda t: t.view(*t.shape[:-1], 4, 8).transpose(-3, -2)  # noqa: E731
    query, key, value = (heads(linear(x)) for linear in (attention.query, attention.key, attention.value))
    keys, values = (heads(part)[None] for part in piece.source().chunk(2, -1))
    key, value = torch.cat((gate * keys, key), 2), torch.cat((gate * values, value), 2)
    seen_by = torch.cat((torch.ones(2, 3), MASK), 1).bool()[:, None, None]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen_by).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_changes_nothing_but_with_the_authors_mean(implementation: str) -> None:
    for compat in (None, "authors"):
        base = build("bert")
        base.set_attn_implementation(implementation)
        model = attached(base, compat=compat)
        alone, batched = model(IDS[1:, :3])[0], model(IDS, MASK)[0][1:, :3]
        # fp32 sums in another order; the mean over padding moves the gates by a few percent
        assert ((alone - batched).abs().max() < 1e-5) == (compat is None)


def test_gates_that_are_shut_or_open_isolate_the_parts() -> None:
    model, base = attached(build("bert"), use=("lora", "adapter")), build("bert")(IDS)[0]
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    with torch.no_grad():
        for gate in gates:
            gate.weight.zero_()
            gate.bias.fill_(-120.0)  # σ is zero in fp32
    assert torch.equal(model(IDS)[0], base)
    gated = [module for module in model.modules() if isinstance(module, GatedLoRA)]
    other = inlay.attach(build("bert"), inlay.LoRA(r=2, alpha=2, targets="query,value"))  # a scale of one
    with torch.no_grad():
        for module, (_, piece) in zip(gated, adapters_of(other).get("default").pieces(), strict=True):
            module.gate.bias.fill_(120.0)
            piece.load_file_tensors({"lora_A.weight": module.lora_A, "lora_B.weight": module.lora_B})
    torch.testing.assert_close(model(IDS)[0], other(IDS)[0])
    assert not torch.allclose(other(IDS)[0], base)


def test_masks_of_every_form_say_the_same() -> None:
    real = MASK.bool()
    square = real[:, None, None].expand(2, 1, 5, 5)
    causal = square & torch.ones(5, 5, dtype=torch.bool).tril()
    low = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    for call in ({"attention_mask": square}, {"attention_mask": causal}, {"mask": low}, {"attention_mask": MASK}):
        assert torch.equal(real_tokens(call, 5), real)
    assert torch.equal(real_tokens({"src_key_padding_mask": ~real}, 5), real)
    assert torch.equal(real_tokens({"src_key_padding_mask": torch.where(real, 0.0, -torch.inf)}, 5), real)
    assert real_tokens({"attention_mask": None}, 5) is None


def test_an_encoder_decoder_has_it_in_its_encoder(tmp_path: Path) -> None:
    model = attached(build("t5"))
    assert {site.path.split(".")[0] for site, _ in adapters_of(model).get("default").pieces()} == {"encoder"}
    expected = model(IDS, MASK, decoder_input_ids=IDS)[0]
    loaded = inlay.load(build("t5"), inlay.save(model, tmp_path))
    assert torch.equal(loaded(IDS, MASK, decoder_input_ids=IDS)[0], expected)


def test_what_cannot_be_is_refused_before_anything_is_changed() -> None:
    model = build("llama")
    with pytest.raises(UnsupportedError, match=r"UniPELT needs .* both ways.*use MAM"):
        inlay.attach(model, UniPELT())
    assert not hasattr(model, "_inlay")
    with pytest.raises(UnsupportedError, match=r"means over a whole text.*chunk_size_feed_forward"):
        inlay.attach(build("bert", chunk_size_feed_forward=2), UniPELT(**SMALL))
    for fields, words in (
        ({"targets": "query"}, "no targets"),
        ({"use": ("lora", "prompt")}, "name some of lora, prefix, adapter"),
        ({"use": ()}, "name some of"),
        ({"compat": "paper"}, "choose None or 'authors'"),
        ({"r": 0}, "r=0"),
    ):
        with pytest.raises(ConfigError, match=words):
            UniPELT(**fields)
