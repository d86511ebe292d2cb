"""Shadow in a running model: caches, checkpointing, two of them, training, and what it refuses."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.tiny import build, build_transformer_encoder
from methods.prompt_hosts import TEXT, checkpoint, host, padded, without_dropout
from oracles.against_peft import randomise
from torch import Tensor
from torch.utils.checkpoint import checkpoint as around
from transformers import DynamicCache, StaticCache

import inlay
from inlay import LoRA, PromptTuning, Shadow, TrainableTokens
from inlay.engine.adapters import adapters_of
from inlay.errors import AdapterError, ConfigError, InlayError, TargetError, UnsupportedError

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NARROW = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2}


def shadowed(name: str = "llama", head: str = "causal", **fields: Any) -> Any:
    """A host with a shadow that matters."""
    torch.manual_seed(0)
    model = inlay.attach(host(name, head), Shadow(**{"r": 2, "alpha": 1.0, "dropout": 0.0, **fields}))
    randomise(model)
    return model


# -- caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("made_here", [True, False])
def test_in_parts_through_a_cache_it_is_the_whole(name: str, made_here: bool) -> None:
    model = shadowed(name)
    inputs = padded(model, "left")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    whole = model(**inputs, position_ids=positions).logits
    cache = None if made_here else DynamicCache(config=model.config)
    parts = []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        output = model(
            inputs["input_ids"][:, start:end], attention_mask=inputs["attention_mask"][:, :end],
            position_ids=positions[:, start:end], past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = output.past_key_values
        parts.append(output.logits)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[seen], whole[seen], **CLOSE)


def test_two_of_them_share_a_cache() -> None:
    model = shadowed()
    inlay.attach(model, Shadow(r=3, alpha=1.0), name="law")
    randomise(model, "law")
    for names in (("default",), ("default", "law")):
        inlay.activate(model, *names)
        texts = [model.generate(TEXT, max_new_tokens=5, use_cache=cached, num_beams=2) for cached in (True, False)]
        assert torch.equal(*texts)


@torch.no_grad()
def test_a_cache_can_be_cut_and_copied() -> None:
    model = shadowed()
    cache = model(TEXT, use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    twin.crop(-2)
    expected = model(TEXT).logits[:, 4:]
    torch.testing.assert_close(model(TEXT[:, 4:], past_key_values=twin).logits, expected, **CLOSE)
    assert cache.get_seq_length() == 6


def test_speculative_decoding_cuts_the_networks_part_too() -> None:
    """Tokens that are guessed and rejected leave no trace in a cache."""
    model, given = shadowed(), {"inputs": TEXT[:1], "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**given, prompt_lookup_num_tokens=2), model.generate(**given))


def test_caches_that_it_refuses() -> None:
    model = shadowed()
    with inlay.disabled(model):
        cache = model(TEXT, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="filled without it"):
        model(TEXT, past_key_values=cache)
    with pytest.raises(UnsupportedError, match="leave cache_implementation unset"):
        model(TEXT, past_key_values=StaticCache(config=model.config, max_cache_len=12))
    model(TEXT)


# -- gradient checkpointing --------------------------------------------------------------------------------------------


def loss_and_gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)  # of dropout
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "fields"), [
    ("llama", {"dropout": 0.3, "num_hidden_layers": 2}),
    ("gpt2", {"dropout": 0.3}),
    ("llama", {"layers": 1}),
    ("llama", NARROW),
])  # fmt: skip
def test_both_checkpoints_give_the_same_gradients(name: str, fields: dict[str, Any]) -> None:
    model = without_dropout(shadowed(name)) if not fields else without_dropout(host(name, "causal"))
    torch.manual_seed(0)
    inlay.attach(model, Shadow(r=2, alpha=1.0, **fields), name="other")
    randomise(model, "other")
    inlay.activate(model, "other")
    model.train()
    inputs = {**padded(model, "right"), "labels": TEXT}
    expected, wanted = loss_and_gradients(model, inputs)
    for reentrant in (False, True):
        checkpoint(model, reentrant)
        found, gradients = loss_and_gradients(model, inputs)
        torch.testing.assert_close(found, expected)
        assert gradients.keys() == wanted.keys()
        for key, gradient in wanted.items():
            torch.testing.assert_close(gradients[key], gradient, **CLOSE)
    blocks = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert len(blocks) >= 2  # as they were left


def test_checkpoints_that_it_refuses() -> None:
    model = shadowed().train()
    block = model.model.layers[1]
    own = block.forward
    for reentrant, message in ((True, "loses the gradients"), (False, "by itself, without the model around it")):
        block.__dict__["forward"] = lambda *a, r=reentrant, **k: around(lambda x: own(x, **k), *a, use_reentrant=r)
        with pytest.raises(UnsupportedError, match=message):
            model(TEXT, labels=TEXT).loss.backward()
    del block.__dict__["forward"]
    inlay.attach(model, Shadow(r=2), name="law")
    checkpoint(model, reentrant=False)
    with pytest.raises(UnsupportedError, match="two active Shadow adapters"):
        model(TEXT, labels=TEXT)
    inlay.activate(model, "law")
    model(TEXT, labels=TEXT).loss.backward()


# -- several, and training ---------------------------------------------------------------------------------------------


def test_each_of_two_computes_what_it_does_alone(tmp_path: Path) -> None:
    alone = [shadowed(r=2, alpha=0.5), shadowed(r=3, update_hidden_size=4)]
    model = host("llama", "causal")
    for number, one in enumerate(alone):
        inlay.load(model, inlay.save(one, tmp_path / str(number)), name=f"n{number}")
    for number, one in enumerate(alone):
        inlay.activate(model, f"n{number}")
        assert torch.equal(model(TEXT, labels=TEXT).logits, one(TEXT).logits)
        assert torch.equal(model(TEXT, labels=TEXT).loss, one(TEXT, labels=TEXT).loss)
    texts = {}
    for names in itertools.permutations(("n0", "n1")):
        inlay.activate(model, *names)
        texts[names] = model(TEXT).logits
    assert not any(torch.equal(logits, one(TEXT).logits) for logits in texts.values() for one in alone)


def test_beside_a_prompt_and_in_half_precision() -> None:
    """The network reads the prompt too, in whatever order the two are attached; its losses are the text's."""
    for methods in ([Shadow(), PromptTuning(num_virtual_tokens=3)], [PromptTuning(num_virtual_tokens=3), Shadow()]):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = inlay.attach(host("llama", "causal").to(dtype), methods)
            plain = inlay.attach(host("llama", "causal").to(dtype), PromptTuning(num_virtual_tokens=3))
            prompts = [p for m in (model, plain) for n, p in m.named_parameters() if p.requires_grad and "prompt" in n]
            with torch.no_grad():
                prompts[0].copy_(prompts[1])
            assert torch.equal(model(TEXT).logits, plain(TEXT).logits)
            assert model(TEXT, labels=TEXT).loss > plain(TEXT, labels=TEXT).loss
            texts = [model.generate(TEXT, max_new_tokens=3, use_cache=cached) for cached in (True, False)]
            assert torch.equal(*texts)


@pytest.mark.parametrize("head", ["causal", "sequence"])
def test_it_learns(head: str) -> None:
    """A few dozen steps halve the loss, with LoRA beside it or not; the base stays as it was."""
    torch.manual_seed(0)
    model = inlay.attach(host("llama", head), [Shadow(r=4, alpha=0.5, auxiliary_loss_weight=0.1), LoRA(r=2)])
    model.train()
    labels = TEXT if head == "causal" else torch.tensor([0, 1])
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(TEXT, labels=labels).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_what_a_call_leaves_behind() -> None:
    """No state, no first state and no changed flag, after a call that failed as after one that did not."""
    model = shadowed()
    piece = next(p for _, p in adapters_of(model).get("default").pieces() if hasattr(p, "shadow_backbone"))
    for ids in (TEXT, torch.tensor([[999]])):
        try:
            model(ids, labels=ids)
        except IndexError:
            assert ids is not TEXT
        assert (piece.trajectory.state, piece.trajectory.first, piece.trajectory.awaited) == (None, None, False)
    assert torch.equal(model(TEXT).logits, model(TEXT).logits)


def test_a_head_in_chunks_serves_both_losses() -> None:
    from inlay.train.head_loss import Chunked

    model = shadowed(auxiliary_loss_weight=0.5)
    expected = model(TEXT, labels=TEXT).loss
    with Chunked(model).installed():
        torch.testing.assert_close(model(TEXT, labels=TEXT).loss, expected, **CLOSE)


# -- by itself ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("fields", [{}, NARROW])
def test_the_network_by_itself_is_a_model_of_its_own(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """head(s⁰), as a model that transformers writes and reads, and that shares nothing with the other."""
    model = shadowed(name, auxiliary_loss_weight=1.0, **fields)
    alone = inlay.standalone_shadow(model)
    with inlay.disabled(model):
        base = model(TEXT, labels=TEXT).loss
    silenced = copy.deepcopy(model)
    for _, piece in adapters_of(silenced).get("default").pieces():
        if hasattr(piece, "alpha"):
            piece.alpha = 0.0  # the blocks are the base's, and what is left is the loss on s⁰
    torch.testing.assert_close(alone(TEXT, labels=TEXT).loss, silenced(TEXT, labels=TEXT).loss - base, **CLOSE)
    assert not {id(p) for p in alone.parameters()} & {id(p) for p in model.parameters()}
    alone.save_pretrained(tmp_path)
    back = type(alone).from_pretrained(tmp_path).eval()
    assert torch.equal(back(TEXT).logits, alone(TEXT).logits)
    assert torch.equal(back.generate(TEXT, max_new_tokens=3), alone.generate(TEXT, max_new_tokens=3, use_cache=False))


def test_what_cannot_stand_by_itself() -> None:
    with pytest.raises(AdapterError, match="has no Shadow"):
        inlay.standalone_shadow(inlay.attach(build("llama", "causal"), LoRA()))
    with pytest.raises(UnsupportedError, match="BertModel has no head that"):
        inlay.standalone_shadow(inlay.attach(build("bert"), Shadow()))
    model = inlay.attach(build("llama", "causal"), [Shadow(), TrainableTokens(token_indices=(5,))])
    with pytest.raises(UnsupportedError, match=r"the table of tokens .* is adapted"):
        inlay.standalone_shadow(model)


# -- what it is given, and what it refuses -----------------------------------------------------------------------------


def test_embeddings_in_place_of_ids() -> None:
    model = shadowed()
    embeds = model.get_input_embeddings()(TEXT)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(TEXT).logits)
    narrow = shadowed(**NARROW)
    with pytest.raises(UnsupportedError, match="a table of its own, and was given inputs_embeds: pass input_ids"):
        narrow(inputs_embeds=embeds)


def test_a_bare_model_and_tuples() -> None:
    model = inlay.attach(build("llama").eval(), Shadow(r=2, alpha=1.0))
    randomise(model)
    found = model(TEXT, use_cache=True).last_hidden_state
    first, cache = model(TEXT[:, :4], use_cache=True, return_dict=False)[:2]
    second = model(TEXT[:, 4:], past_key_values=cache, return_dict=False)[0]
    torch.testing.assert_close(torch.cat((first, second), dim=1), found, **CLOSE)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 0}, ConfigError, "r=0"),
        ({"alpha": 0.0}, ConfigError, "alpha=0.0"),
        ({"dropout": 1.0}, ConfigError, "dropout=1.0"),
        ({"num_hidden_layers": 0}, ConfigError, "num_hidden_layers=0"),
        ({"update_hidden_size": 0}, ConfigError, "update_hidden_size=0"),
        ({"auxiliary_loss_weight": -1.0}, ConfigError, "auxiliary_loss_weight=-1.0"),
        ({"overrides": {"0": {"r": 2}}}, ConfigError, "share one state"),
        ({"pretrained": "nowhere"}, ConfigError, r"pretrained='nowhere'\): there is no such model"),
        ({"pretrained": "x", "hidden_size": 8}, ConfigError, "has the sizes of that model"),
        ({"targets": "mlp"}, TargetError, "is no block: target 'block'"),
        ({"num_attention_heads": 5}, ConfigError, "no LlamaModel of .*num_attention_heads=5 .*2 heads for keys"),
    ],
)
def test_fields_that_it_refuses(fields: dict[str, Any], error: type[InlayError], message: str) -> None:
    model = build("llama", "causal")
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        inlay.attach(model, Shadow(**fields))
    assert list(model.state_dict()) == keys


def test_sizes_that_the_networks_class_refuses() -> None:
    with pytest.raises(ConfigError, match=r"no GPT2Model of num_hidden_layers=1, hidden_size=30 \("):
        inlay.attach(build("gpt2", "causal"), Shadow(hidden_size=30))


def test_heads_that_read_something_else() -> None:
    with pytest.raises(UnsupportedError, match="OPTDecoder projects it"):
        inlay.attach(build("opt", "causal", word_embed_proj_dim=16), Shadow())


def test_blocks_that_do_not_follow_upon_each_other() -> None:
    with pytest.raises(ConfigError, match=r"\[0, 2\] do not"):
        inlay.attach(build("llama", "causal", num_hidden_layers=3), Shadow(layers=[0, 2]))


@pytest.mark.parametrize("make", [
    lambda: build("t5", "conditional"), lambda: build("vit", "image"),
    build_transformer_encoder,
])  # fmt: skip
def test_models_that_it_refuses(make: Any) -> None:
    with pytest.raises(UnsupportedError, match="Shadow needs a model"):
        inlay.attach(make(), Shadow())
