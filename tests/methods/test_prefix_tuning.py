"""Prefix tuning, against the base model reading a text: a prefix that holds the keys and values of the tokens P must do
to a text x what the base does to [P; x], whatever generates; elsewhere, against attention over [K_p; K] written out."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine import tiny
from methods.prompt_hosts import LENGTH, PROMPT, TEXT, N, before, checkpoint, host, padded, without_dropout
from torch import Tensor, nn

import inlay
from inlay import PrefixTuning
from inlay.engine.adapters import adapters_of
from inlay.errors import CheckpointError, ConfigError, TargetError, UnsupportedError
from inlay.pieces.prompts import prefix_source

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""The same sums over the same keys, in another order of rows."""


def reading(monkeypatch: pytest.MonkeyPatch, model: Any) -> tuple[Any, Any]:
    """The model with the keys and values of the tokens PROMPT as its prefix, and the model as it was."""
    monkeypatch.setattr(prefix_source, "token_encoder", lambda *_: lambda text: [int(word) for word in text.split()])
    base = copy.deepcopy(model)
    text = " ".join(str(int(token)) for token in PROMPT)
    inlay.attach(model, PrefixTuning(num_virtual_tokens=N, init="text", text=text), modules_to_save=[])
    return model, base


def prefixed(name: str, head: str, attention: str = "sdpa", **fields: Any) -> Any:
    model = host(name, head, attention)
    return inlay.attach(model, PrefixTuning(num_virtual_tokens=N, **fields), modules_to_save=[])


def implementations(model: nn.Module) -> set[str]:
    """What the configs of a model's parts call their attention."""
    return {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}  # type: ignore[union-attr]


# -- the same as reading a text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name",
    ["gpt2", "gpt-neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "phi", "phi3", "mixtral"],
)
def test_a_decoder_reads_on_after_its_prefix(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = reading(monkeypatch, host(name, "causal", attention))
    expected = base(before(TEXT)).logits[:, N:]
    torch.testing.assert_close(model(TEXT).logits, expected, **CLOSE)
    mask = torch.ones_like(TEXT)
    torch.testing.assert_close(model(TEXT, attention_mask=mask).logits, expected, **CLOSE)


def test_positions_of_padding_and_soft_capped_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = reading(monkeypatch, host("gemma2", "causal", "eager"))
    torch.testing.assert_close(model(TEXT).logits, base(before(TEXT)).logits[:, N:], **CLOSE)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "prefill in chunks": {"prefill_chunk_size": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_decoder_generates_as_after_the_text(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = reading(monkeypatch, host(name, "causal"))
    text = TEXT[:1] if way == "prompt lookup" else TEXT
    torch.manual_seed(1)
    found = model.generate(text, max_new_tokens=5, **WAYS[way])
    torch.manual_seed(1)
    expected = base.generate(before(text), max_new_tokens=5, **WAYS[way])
    assert torch.equal(found, expected[:, N:])


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma3"])
def test_padding_and_an_earlier_cache_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = reading(monkeypatch, host(name, "causal"))
    alone = base.generate(before(TEXT[1:, :-2]), max_new_tokens=6)[:, N:]
    assert torch.equal(model.generate(**padded(model, "left"), max_new_tokens=6)[1:, 2:], alone)
    first = model.generate(TEXT[1:, :-2], max_new_tokens=3, return_dict_in_generate=True)
    went_on = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=3)
    assert torch.equal(went_on, alone)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "albert", "modernbert"])
def test_an_encoder_does_not_see_padding(name: str) -> None:
    model = prefixed(name, "sequence")
    found, alone = model(**padded(model, "right")).logits[1:], model(TEXT[1:, :-2]).logits
    torch.testing.assert_close(found, alone, **CLOSE)
    with inlay.disabled(model):
        assert not torch.allclose(model(TEXT[1:, :-2]).logits, alone, **CLOSE)


# -- the formula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_is_a_softmax_over_prefix_and_text(attention: str) -> None:
    model = prefixed("distilbert", "trunk", attention, shift_positions=False)
    layer = model.transformer.layer[0].attention
    x = torch.randn(2, LENGTH, 32)
    piece = adapters_of(model).loaded["default"].placed[0][0][1]
    prefix_keys, prefix_values = (part.view(N, 4, 8).transpose(0, 1) for part in piece.source().chunk(2, dim=-1))
    query, key, value = (m(x).view(2, LENGTH, 4, 8).transpose(1, 2) for m in (layer.q_lin, layer.k_lin, layer.v_lin))
    keys = torch.cat((prefix_keys.expand(2, -1, -1, -1), key), dim=2)
    values = torch.cat((prefix_values.expand(2, -1, -1, -1), value), dim=2)
    mixed = (query @ keys.transpose(2, 3) / 8**0.5).softmax(-1) @ values
    torch.testing.assert_close(layer(x)[0], layer.out_lin(mixed.transpose(1, 2).reshape(2, LENGTH, 32)), **CLOSE)


@pytest.mark.parametrize(
    ("name", "head", "inputs"),
    [
        ("vit", "image", {"pixel_values": torch.ones(2, 3, 16, 16)}),
        ("wav2vec2", "ctc", {"input_values": torch.linspace(-1, 1, 800).view(2, 400)}),
        ("whisper", "conditional", {"input_features": torch.ones(2, 8, 32), "decoder_input_ids": TEXT}),
        ("deepseek-v3", "causal", {"input_ids": TEXT}),
    ],
)
def test_images_sound_and_latent_attention(name: str, head: str, inputs: dict[str, Tensor]) -> None:
    model = prefixed(name, head, stacks="both")
    found = model(**inputs).logits
    with inlay.disabled(model):
        assert not torch.allclose(model(**inputs).logits, found, **CLOSE)
    found.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("stacks", ["decoder", "encoder", "both"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_generates_the_same_by_every_way(name: str, stacks: Any) -> None:
    model = prefixed(name, "conditional", stacks=stacks)
    inside = {".".join(n.split(".inlays.")[0].split(".")) for n, p in model.named_parameters() if p.requires_grad}
    assert {("encoder" in path, "decoder" in path) for path in inside} == {
        "decoder": {(False, True)}, "encoder": {(True, False)}, "both": {(False, True), (True, False)}
    }[stacks]  # fmt: skip
    inputs = padded(model, "right")
    expected = model.generate(**inputs, max_new_tokens=5)
    for way in ("without a cache", "static cache"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, **WAYS[way]), expected), way
    alone = model.generate(TEXT[1:, :-2], max_new_tokens=5)
    assert torch.equal(expected[1:], alone)
    logits = model(**inputs, decoder_input_ids=expected).logits
    torch.testing.assert_close(logits[:, :-1].argmax(-1), expected[:, 1:])


def test_layers_and_cross_attention_can_be_chosen() -> None:
    model = inlay.attach(host("bart", "conditional"), PrefixTuning(num_virtual_tokens=N, targets="cross_attention"))
    assert inlay.summary(model).trainable_parameters == 2 * N * 64
    found = model(TEXT, labels=TEXT)
    assert found.loss != copy.deepcopy(inlay.detach(model))(TEXT, labels=TEXT).loss
    model = inlay.attach(host("llama", "causal"), PrefixTuning(num_virtual_tokens=N, layers=-1))
    assert inlay.summary(model).trainable_parameters == N * 2 * 16


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), [("bert", "sequence"), ("t5", "conditional"), ("gpt2", "causal")])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_given_back_as_it_was(name: str, head: str, attention: str) -> None:
    model = host(name, head, attention)
    base = copy.deepcopy(model)
    more = {"labels": TEXT} if head == "conditional" else {}
    inlay.attach(model, PrefixTuning(num_virtual_tokens=N), "a", modules_to_save=[])
    alone = model(TEXT, **more).logits
    inlay.attach(model, PrefixTuning(num_virtual_tokens=2, projection_size=5), "b", modules_to_save=[])
    assert not torch.allclose(model(TEXT, **more).logits, alone, **CLOSE)
    with inlay.disabled(model):
        assert torch.equal(model(TEXT, **more).logits, base(TEXT, **more).logits)
    with inlay.using(model, "a"):
        assert torch.equal(model(TEXT, **more).logits, alone)
    inlay.detach(model, "b")
    assert torch.equal(model(TEXT, **more).logits, alone)
    assert implementations(model) != {attention}
    inlay.detach(model)
    assert implementations(model) == {attention}
    assert model.config.to_dict() == base.config.to_dict()
    assert torch.equal(model(TEXT, **more).logits, base(TEXT, **more).logits)


def test_two_prefixes_are_one_longer_prefix() -> None:
    model = host("distilbert", "trunk")
    for adapter in ("inner", "outer"):
        inlay.attach(model, PrefixTuning(num_virtual_tokens=N, shift_positions=False), adapter)
    both = inlay.attach(host("distilbert", "trunk"), PrefixTuning(num_virtual_tokens=2 * N, shift_positions=False))
    pairs = zip(*(adapters_of(model).loaded[one].placed[0] for one in ("outer", "inner")), strict=True)
    with torch.no_grad():
        for (_, long), ((_, outer), (_, inner)) in zip(
            adapters_of(both).loaded["default"].placed[0], pairs, strict=True
        ):
            long.source().copy_(torch.cat((inner.source(), outer.source())))
    expected = both(TEXT).last_hidden_state
    for order in (("inner", "outer"), ("outer", "inner")):
        inlay.activate(model, *order)
        # Order of rows is order of summation only.
        torch.testing.assert_close(model(TEXT).last_hidden_state, expected, **CLOSE)


def test_copies_and_pickles_keep_the_prefix(tmp_path: Path) -> None:
    model = prefixed("t5", "conditional", "eager", projection_size=5)
    expected = model(TEXT, labels=TEXT).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(TEXT, labels=TEXT).logits, expected)
    inlay.detach(copied)
    assert torch.equal(model(TEXT, labels=TEXT).logits, expected)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, TEXT, expected.detach())))
    program = (
        "import pickle, sys, torch; model, text, expected = pickle.load(open(sys.argv[1], 'rb'));"
        "sys.exit(not torch.equal(model(text, labels=text).logits, expected))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pickle")], check=True)


@pytest.mark.parametrize("projection_size", [None, 5])
@pytest.mark.parametrize(("name", "head"), [("bert", "sequence"), ("llama", "causal"), ("t5", "conditional")])
def test_checkpointing_and_compiling_change_nothing(name: str, head: str, projection_size: int | None) -> None:
    model = without_dropout(host(name, head, use_cache=False))
    method = PrefixTuning(num_virtual_tokens=N, stacks="both", projection_size=projection_size)
    inlay.attach(model, method, modules_to_save=[])
    inputs = {**padded(model, "right"), "labels": torch.tensor([0, 1]) if head == "sequence" else TEXT}

    def gradients(run: Any) -> list[Tensor]:
        model.zero_grad()
        run(**inputs).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients(model)
    torch._dynamo.reset()
    torch.testing.assert_close(gradients(torch.compile(model, fullgraph=True, backend="eager")), expected, **CLOSE)
    model.train()
    for reentrant in (True, False):
        checkpoint(model, reentrant)
        torch.testing.assert_close(gradients(model), expected, **CLOSE)
        checkpoint(model, None)
    largest = max(gradient.abs().max() for gradient in expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, gradient in zip(gradients(model), expected, strict=True):
            assert (found - gradient).abs().max() < 0.1 * largest  # bf16 keeps 8 bits


def test_a_half_precision_model_trains_fp32_prefixes() -> None:
    model = inlay.attach(host("llama", "causal").to(torch.bfloat16), PrefixTuning(num_virtual_tokens=N))
    output = model(TEXT, labels=TEXT)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}  # type: ignore[union-attr]


# -- parameters and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head", "row"),
    [
        ("bert", "sequence", 2 * 32),
        ("llama", "causal", 2 * 16),  # 2 key–value heads of 8
        ("deepseek-v3", "causal", 4 * (10 + 8)),  # keys of 6 + 4, values of 8
        ("phi3", "causal", 2 * 16),  # fused projection
        ("t5", "conditional", 2 * 32),
    ],
)
def test_parameters_are_those_of_the_formula(name: str, head: str, row: int) -> None:
    assert inlay.summary(prefixed(name, head)).trainable_parameters == N * 2 * row
    model = prefixed(name, head, projection_size=5)
    assert inlay.summary(model).trainable_parameters == N * 32 + 5 * 33 + 6 * 2 * row


@pytest.mark.parametrize("fields", [{}, {"projection_size": 5}, {"layers": 1}, {"stacks": "both"}])
def test_the_file_brings_back_the_same_training(fields: dict[str, Any], tmp_path: Path) -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = model(TEXT, labels=TEXT).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    model = prefixed("bart", "conditional", **fields)
    optimizer = optimizer_of(model)
    step(model, optimizer)
    inlay.save(model, tmp_path)
    other = inlay.load(host("bart", "conditional"), tmp_path, trainable=True)
    again = optimizer_of(other)
    assert [step(other, again) for _ in range(3)] == [step(model, optimizer) for _ in range(3)]
    if "projection_size" in fields:
        (tmp_path / "adapter_extra.safetensors").unlink()
        with pytest.raises(CheckpointError):
            inlay.load(host("bart", "conditional"), tmp_path)


# -- what it cannot do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention"), [("deberta-v2", "DisentangledSelfAttention"), ("bloom", "BloomAttention")]
)
def test_attentions_that_are_closed_are_refused(name: str, attention: str) -> None:
    if name == "bloom":
        model: Any = transformers.BloomModel(
            transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
        )
    else:
        model = tiny.build(name)
    keys = list(model.state_dict())
    with pytest.raises(UnsupportedError, match=f"{type(model).__name__}: {attention}"):
        inlay.attach(model, PrefixTuning())
    assert list(model.state_dict()) == keys


def test_other_attention_functions_are_refused() -> None:
    model = host("llama", "causal")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedError, match="set_attn_implementation"):
        inlay.attach(model, PrefixTuning())
    model = host("gpt2", "causal", "eager", reorder_and_upcast_attn=True)
    with pytest.raises(UnsupportedError, match="reorder_and_upcast_attn"):
        inlay.attach(model, PrefixTuning())
    model = prefixed("llama", "causal")
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedError, match="after a prefix was attached"):
        model(TEXT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "1 or more"),
        ({"projection_size": 0}, "1 or more"),
        ({"stacks": "all"}, "choose one of"),
        ({"init": "text"}, "needs text="),
        ({"init": "text", "text": "a", "projection_size": 4}, "cannot be inverted"),
        ({"overrides": {"0": {"num_virtual_tokens": 3}}}, "no overrides"),
    ],
)
def test_fields_that_cannot_be_used_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrefixTuning(**fields)


def test_places_and_lengths_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(TargetError):
        inlay.attach(host("llama", "causal"), PrefixTuning(targets="q_projection"))
    with pytest.raises(UnsupportedError, match="decoder that caches"):
        inlay.attach(host("bert", "sequence"), PrefixTuning(init="text", text="a", tokenizer="/nowhere"))
    model = inlay.attach(host("bert", "sequence"), PrefixTuning(num_virtual_tokens=36))
    with pytest.raises(ConfigError, match="shorten the texts to 4 tokens"):  # 40 positions
        model(TEXT)
    model = inlay.attach(host("bert", "sequence"), PrefixTuning(num_virtual_tokens=36, shift_positions=False))
    assert model(TEXT).logits.isfinite().all()
