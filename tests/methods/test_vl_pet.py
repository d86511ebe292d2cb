"""VL-PET on a tiny BART and T5 that read images: every gate by hand, the papers' counts, padding, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from engine.tiny import build
from torch import Tensor, nn

import inlay
from inlay import VLPET
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, TargetError, UnsupportedError
from inlay.pieces.bottlenecks.granular_gate import VARIANTS, GranularGate

SMALL = {"r": 4, "gate_r": 3, "decoder_r": 2}
IDS = torch.arange(3, 13).view(2, 5)


class Reader(nn.Module):
    """An encoder–decoder that is given images as vectors before those of the text."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.language: Any = build(name, "conditional")
        self.visual_projection = nn.Linear(6, 32)

    def forward(self, features: Tensor, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Any:
        text = self.language.get_input_embeddings()(ids)
        embedded = torch.cat((self.visual_projection(features), text), dim=1)
        seen = torch.ones(embedded.shape[:2], dtype=torch.long) if mask is None else mask
        return self.language(inputs_embeds=embedded, attention_mask=seen, labels=labels)


def randomise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def by_hand(gate: GranularGate, x: Tensor, h: Tensor) -> Tensor:
    def bottleneck(part: Any, x: Tensor) -> Tensor:
        hidden = F.gelu(x @ part.down.weight.T + part.down.bias, approximate="tanh")
        return hidden @ part.up.weight.T + part.up.bias

    h = h + bottleneck(gate.adapter, h)
    if gate.variant == "large":
        return bottleneck(gate.gate, x).sigmoid() * h
    if gate.variant == "middleX":
        return ((x + h) @ gate.weight + gate.bias).sigmoid()[..., None] * h
    if gate.variant == "middleY":
        return (1 + gate.weight) * h
    return (torch.cat((x, h), -1) @ gate.weight + gate.bias).sigmoid().mean(1)[:, None, None] * h


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_encoders_sub_layers_and_the_decoders_values(variant: str) -> None:
    model, x = build("bart"), torch.randn(2, 5, 32)
    layer, other = model.encoder.layers[0], model.decoder.layers[0].encoder_attn.v_proj
    attended, value = layer.self_attn(x)[0], other(x)
    randomise(inlay.attach(model, VLPET(variant=variant, **SMALL)))
    attention, network = (
        next(module for module in place.modules() if isinstance(module, GranularGate))
        for place in (layer.self_attn, layer.fc2)
    )
    torch.testing.assert_close(layer.self_attn(x)[0], by_hand(attention, x, attended), rtol=1e-4, atol=1e-5)
    t = layer.self_attn_layer_norm(x + by_hand(attention, x, attended))
    h = F.linear(F.gelu(layer.fc1(t)), layer.fc2.weight, layer.fc2.bias)
    expected = layer.final_layer_norm(t + by_hand(network, t, h))
    torch.testing.assert_close(layer(x, None), expected, rtol=1e-4, atol=1e-5)
    (adapter,) = (module for name, module in other.named_modules() if name.endswith("bottleneck"))
    hidden = F.gelu(x @ adapter.down.weight.T + adapter.down.bias, approximate="tanh")
    torch.testing.assert_close(other(x), value + hidden @ adapter.up.weight.T + adapter.up.bias, rtol=1e-4, atol=1e-5)
    assert not any("inlays" in name for name, _ in model.decoder.layers[0].self_attn.named_modules())


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_reader_of_images_starts_as_defined_learns_and_is_saved(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, features = Reader(name), torch.randn(2, 3, 6)
    labels = torch.randint(3, 60, (2, 4))
    with torch.no_grad():
        base = model(features, IDS, labels).logits
        inlay.attach(model.language, VLPET(variant="middleY", **SMALL))
        assert torch.equal(model(features, IDS, labels).logits, base)
        inlay.detach(model.language)
        inlay.attach(model.language, VLPET(**SMALL))
        assert not torch.allclose(model(features, IDS, labels).logits, base)  # G is 1/2
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(features, IDS, labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert "visual_projection.weight" in trained  # outside the model that was adapted: the caller's to freeze or train
    assert not any("decoder" in key and "v." not in key and "v_proj" not in key for key in trained)
    inlay.save(model.language, tmp_path)
    found, other = model(features, IDS, labels).logits, Reader(name)
    other.visual_projection = model.visual_projection
    inlay.load(other.language, tmp_path)
    assert torch.equal(other(features, IDS, labels).logits, found)


def test_padding_does_not_count_in_the_small_gate() -> None:
    torch.manual_seed(0)
    model, features, labels = Reader("bart"), torch.randn(2, 3, 6), torch.randint(3, 60, (2, 4))
    randomise(inlay.attach(model.language, VLPET(variant="small", **SMALL)))
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    padded = model(features, IDS, labels, mask).logits[1:]
    # fp32 sums in another order
    torch.testing.assert_close(padded, model(features[1:], IDS[1:, :3], labels[1:]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "gates"),
    [("large", 12 * 148_320), ("middleX", 12 * 769), ("middleY", 12 * 768), ("small", 12 * 1_537)],
)
def test_the_papers_counts_on_bart_base(variant: str, gates: int) -> None:
    with torch.device("meta"):
        config = transformers.BartConfig(
            d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
            encoder_attention_heads=12, decoder_attention_heads=12,
        )  # fmt: skip
        model = transformers.BartForConditionalGeneration(config)
    inlay.attach(model, VLPET(variant=variant))
    norms = 13 * 2 * 768
    assert inlay.summary(model).trainable_parameters == 1_779_840 + gates + 889_920 + norms


def test_heads_of_the_down_projection_are_one_linear() -> None:
    x, whole = torch.randn(3, 32), nn.Linear(32, 8)
    heads = [(whole.weight[part], whole.bias[part]) for part in torch.arange(8).view(4, 2)]
    torch.testing.assert_close(torch.cat([F.linear(x, *head) for head in heads], -1), whole(x))


def test_a_place_that_is_called_by_keyword_and_one_that_is_called_alone() -> None:
    x = torch.randn(1, 3, 32)
    model = randomise(inlay.attach(build("bart"), VLPET(**SMALL, targets="re:encoder.*fc1$")))
    first = model.encoder.layers[0].fc1
    assert torch.equal(first(input=x), first(x))
    model = inlay.attach(build("bart"), VLPET(**SMALL))
    second = model.encoder.layers[0].fc2
    with pytest.raises(UnsupportedError, match=r"cannot sit at encoder.*fc1: .* 32 features go in and 48 come out"):
        inlay.attach(build("bart"), VLPET(**SMALL, variant="middleX", targets="re:encoder.*fc1$"))
    with pytest.raises(UnsupportedError, match="second projection was called without its first"):
        second(torch.randn(1, 3, second.in_features))


def test_what_cannot_be_is_refused_before_anything_is_changed() -> None:
    for fields, words in (
        ({"variant": "medium"}, "choose one of large, middleX, middleY, small"),
        ({"r": 0}, r"VLPET\(r=0\)"),
        ({"scale": "a"}, r"VLPET\(scale='a'\)"),
        ({"init": "zero"}, "choose one of zero_up, authors"),
        ({"exclude": "0"}, "exclude with targets only"),
        ({"overrides": {"0": {"r": 2}}}, "no overrides"),
    ):
        with pytest.raises(ConfigError, match=words):
            VLPET(**fields)
    with pytest.raises(UnsupportedError, match=r"VLPET\(variant='small'\) cannot sit in layers.0: .* later ones"):
        inlay.attach(build("llama"), VLPET(variant="small", targets="mlp"))
    model = build("bert")
    for method, error, words in (
        (VLPET(), UnsupportedError, "VLPET needs an encoder–decoder"),
        (VLPET(targets="self_attention"), UnsupportedError, "VLPET: the width of what comes out"),
        (VLPET(targets="qeury"), TargetError, "did you mean 'query'"),
    ):
        with pytest.raises(error, match=words):
            inlay.attach(model, method)
        assert not hasattr(model, "_inlay")
