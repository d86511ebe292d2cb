"""Full fine-tuning: every parameter, each tied one once, and the base's bits as they were."""

from __future__ import annotations

import pytest
import torch
from engine.tiny import build
from torch import nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import UnsupportedError


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", "sequence"),
        ("gpt2", "causal"),
        ("t5", "conditional"),
        ("albert", "masked"),
        ("mixtral", "causal"),
        ("wav2vec2", "trunk"),
    ],
)
def test_every_parameter_is_trained(name: str, head: str) -> None:
    model = build(name, head)
    count = sum(p.numel() for p in model.parameters())
    inlay.attach(model, inlay.FullFineTuning())
    assert inlay.summary(model).trainable_parameters == count


def test_a_step_equals_training_the_model_itself() -> None:
    ours, plain = build("gpt2", "causal"), build("gpt2", "causal")
    inlay.attach(ours, inlay.FullFineTuning())
    ids = torch.arange(3, 23).reshape(2, 10)
    for model in (ours, plain):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(ours(ids).logits, plain(ids).logits)
    inlay.detach(ours)
    fresh = build("gpt2", "causal")
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), fresh.parameters(), strict=True))


def test_parametrised_weights_are_trained() -> None:
    model = build("wav2vec2")
    base = model(x := torch.randn(1, 400))[0]
    inlay.attach(model, inlay.FullFineTuning())
    convolution = model.encoder.pos_conv_embed.conv
    pieces = {site.name: piece for site, piece in adapters_of(model).get("default").pieces()}
    with torch.no_grad():
        for name, piece in pieces.items():
            if "pos_conv_embed.conv.parametrizations" in name:
                piece.value.mul_(1.5)
    assert convolution.parametrizations is not None
    assert not torch.equal(model(x)[0], base)


def test_some_of_the_model() -> None:
    model = inlay.attach(build("llama", "causal"), inlay.FullFineTuning(exclude="embed,lm_head"))
    assert not any("embed_tokens" in n or "lm_head" in n for n, p in model.named_parameters() if p.requires_grad)


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 2))
    with pytest.raises(UnsupportedError, match=r"0\.weight_ih_l0.*exclude='0'"):
        inlay.attach(model, inlay.FullFineTuning())
    inlay.attach(model, inlay.FullFineTuning(exclude="0"))
    assert inlay.summary(model).trainable_parameters == 10
