"""Shadow against HF peft: losses, outputs, gradients, generated texts, files both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from engine.tiny import build
from methods.prompt_hosts import TEXT, checkpoint, host
from oracles.against_peft import file_key, same_tensors, shift
from safetensors.torch import load_file, save_file

import inlay
from inlay import Shadow
from inlay.engine.adapters import adapters_of

# peft 0.21 itself calls names that transformers has renamed since.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 outputs of order 1: T and G begin with one product here, and the gate interpolates."""
MASK = torch.ones_like(TEXT)
MASK[1, :2] = 0
SIZES = {
    "shadow_hidden_size": 16, "shadow_intermediate_size": 20, "shadow_num_hidden_layers": 2,
    "shadow_num_attention_heads": 2,
}  # fmt: skip


def in_peft(model: Any, head: str = "causal", **config: Any) -> peft.PeftModel:
    """peft's model, every tensor moved away from its start."""
    torch.manual_seed(0)
    config = {"r": 2, "update_hidden_size": 3, "shadow_alpha": 1.0, **config}
    task = {"causal": "CAUSAL_LM", "sequence": "SEQ_CLS"}[head]
    theirs = peft.get_peft_model(model, peft.ShadowConfig(task_type=task, **config)).eval()
    shift(p for p in theirs.parameters() if p.requires_grad)
    return theirs


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Ours, by the keys of the file."""
    adapter = adapters_of(model).get("default")
    pairs = zip(adapter.methods, adapter.placed, strict=True)
    tensors = {key: tensor for method, placed in pairs for key, tensor in method.export(placed)[0].items()}
    return {key.replace(".default.", "."): t.grad for key, t in tensors.items() if t.grad is not None}


CASES = {
    "llama": ("llama", "causal", {}),
    "gpt2": ("gpt2", "causal", {}),
    "opt": ("opt", "causal", {}),
    "qwen3 of two layers": ("qwen3", "causal", {"shadow_num_hidden_layers": 2}),
    "narrow": ("llama", "causal", SIZES),
    "own embeddings": ("mistral", "causal", {"share_embeddings": False, "auxiliary_loss_weight": 0.0}),
    "classes": ("llama", "sequence", {"auxiliary_loss_weight": 0.5}),
    "the upper block": ("llama", "causal", {"target_modules": r".*layers\.1"}),
}


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case: str, tmp_path: Path) -> None:
    name, head, config = CASES[case]
    model = host(name, head)
    theirs = in_peft(copy.deepcopy(model), head, **config)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    mine = inlay.load(copy.deepcopy(model), tmp_path / "theirs", trainable=True)
    labels = TEXT if head == "causal" else torch.tensor([1, 0])
    inputs = {"input_ids": TEXT, "attention_mask": MASK, "labels": labels}
    found, expected = mine(**inputs), theirs(**inputs)
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits), **CLOSE)
    assert (found.logits - model(**inputs).logits).abs().max() > 1e-2
    found.loss.backward()
    expected.loss.backward()
    their_gradients = {file_key(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    our_gradients = gradients(mine)
    assert our_gradients.keys() == their_gradients.keys()
    least = 1e-4 * max(float(gradient.abs().max()) for gradient in their_gradients.values())
    for key, gradient in their_gradients.items():
        # Sums in another order; what is zero but for rounding (a key's bias moves no attention) is compared as such.
        scale = gradient.abs().max().clamp(min=least)
        torch.testing.assert_close(our_gradients[key] / scale, gradient / scale, rtol=1e-3, atol=1e-4)
    inlay.save(mine, tmp_path / "ours")
    if name != "gpt2":
        same_tensors(tmp_path / "theirs", tmp_path / "ours")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        torch.testing.assert_close(back(**inputs).logits, expected.logits, **CLOSE)
    again = inlay.load(model, tmp_path / "ours")(**inputs)
    torch.testing.assert_close((again.loss, again.logits), (found.loss, found.logits), rtol=0, atol=0)


def test_peft_trains_no_update_of_the_last_block(tmp_path: Path) -> None:
    """Nothing reads the state after it: here they are buffers, which the file has and no optimiser."""
    model = host("llama", "causal")
    theirs = in_peft(copy.deepcopy(model))
    theirs(input_ids=TEXT, labels=TEXT).loss.backward()
    idle = {file_key(n) for n, p in theirs.named_parameters() if p.requires_grad and p.grad is None}
    assert idle == {
        f"base_model.model.model.layers.1.shadow_update_{which}.{layer}.{name}"
        for which in ("transform", "gate") for layer in (0, 2) for name in ("weight", "bias")
    }  # fmt: skip
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    mine = inlay.load(model, tmp_path, trainable=True)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert inlay.summary(mine).trainable_parameters == trained - 2 * (3 * 32 + 3 + 32 * 3 + 32)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_gpt2_and_the_table_that_peft_keeps_and_never_reads(tmp_path: Path) -> None:
    """peft takes `embed_tokens` out of the network, and GPT-2's is `wte`: it is saved, and never has a gradient."""
    model = host("gpt2", "causal")
    theirs = in_peft(copy.deepcopy(model))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    theirs(input_ids=TEXT, labels=TEXT).loss.backward()
    (table,) = (p for n, p in theirs.named_parameters() if n.endswith("shadow_backbone.default.wte.weight"))
    assert table.requires_grad
    assert table.grad is None
    inlay.save(inlay.load(copy.deepcopy(model), tmp_path / "theirs"), tmp_path / "ours")
    left, right = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("theirs", "ours"))
    assert left.keys() - right.keys() == {"base_model.shadow_backbone.default.wte.weight"}
    assert all(torch.equal(left[key], right[key]) for key in right)
    back = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=TEXT).logits, theirs(input_ids=TEXT).logits, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_texts_are_pefts_with_and_without_a_cache(name: str, tmp_path: Path) -> None:
    model = host(name, "causal")
    theirs = in_peft(copy.deepcopy(model))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    mine = inlay.load(copy.deepcopy(model), tmp_path)
    given = {"input_ids": TEXT, "attention_mask": MASK, "max_new_tokens": 6, "do_sample": False}
    greedy, without = mine.generate(**given), mine.generate(**given, use_cache=False)
    assert torch.equal(greedy, without)
    assert torch.equal(greedy, theirs.generate(**given))
    assert not torch.equal(greedy, model.generate(**given))
    beams = mine.generate(**given, num_beams=3)
    assert torch.equal(beams, mine.generate(**given, num_beams=3, use_cache=False))


@pytest.mark.parametrize("case", ["llama", "narrow", "classes"])
def test_the_network_by_itself_is_pefts(case: str, tmp_path: Path) -> None:
    name, head, config = CASES[case]
    model = host(name, head)
    theirs = in_peft(copy.deepcopy(model), head, **config)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    mine = inlay.standalone_shadow(inlay.load(model, tmp_path))
    expected = theirs.base_model.unload_shadow()(input_ids=TEXT, attention_mask=MASK).logits
    found = mine(input_ids=TEXT, attention_mask=MASK).logits
    seen = MASK.bool() if head == "causal" else ...
    torch.testing.assert_close(found[seen], expected[seen], **CLOSE)


def pretrained(folder: Path, kind: str) -> str:
    """A small Llama on disk: as transformers writes one, or as the authors do, with a projection."""
    torch.manual_seed(1)
    small: Any = build("llama", hidden_size=16, num_hidden_layers=1, intermediate_size=20, head_dim=4)
    small.save_pretrained(folder)
    if kind == "projected":
        tensors = {f"shadow_model.{key}": value.contiguous() for key, value in small.state_dict().items()}
        save_file({**tensors, "shadow_hidden_projection.weight": torch.randn(32, 16)}, folder / "model.safetensors")
        config = {"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": small.config.to_dict()}
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("kind", ["plain", "projected"])
def test_a_pretrained_network(kind: str, tmp_path: Path) -> None:
    """It starts with its own weights, its table of tokens stays as it is, and the files go both ways."""
    name = pretrained(tmp_path / "small", kind)
    model = host("llama", "causal")
    theirs = in_peft(copy.deepcopy(model), shadow_model=name, shadow_dropout=0.0)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    mine = inlay.load(copy.deepcopy(model), tmp_path / "theirs", trainable=True)
    inputs = {"input_ids": TEXT, "attention_mask": MASK, "labels": TEXT}
    found, expected = mine(**inputs), theirs(**inputs)
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits), **CLOSE)
    found.loss.backward()
    expected.loss.backward()
    their_gradients = {file_key(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    our_gradients = {key: gradient.clone() for key, gradient in gradients(mine).items()}
    assert our_gradients.keys() == their_gradients.keys()
    assert not any("embed_tokens" in key for key in our_gradients)
    for key, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-3, atol=1e-4)
    for reentrant in (False, True):
        checkpoint(mine.train(), reentrant)
        mine.zero_grad()
        mine(**inputs).loss.backward()
        for key, gradient in gradients(mine).items():
            torch.testing.assert_close(gradient, our_gradients[key], rtol=1e-3, atol=1e-4)
    mine.eval()
    inlay.save(mine, tmp_path / "ours")
    same_tensors(tmp_path / "theirs", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    torch.testing.assert_close(back(**inputs).logits, expected.logits, **CLOSE)
    born = inlay.attach(model, Shadow(pretrained=name))
    start = peft.get_peft_model(host("llama", "causal"), peft.ShadowConfig(task_type="CAUSAL_LM", shadow_model=name))
    tensors = {key: value for key, value in start.state_dict().items() if "shadow_backbone" in key}
    own = {key.partition("shadow_backbone.")[2]: t for key, t in born.state_dict().items() if "shadow_backbone" in key}
    assert {key.partition("default.")[2]: value.tolist() for key, value in tensors.items()} == {
        key: value.tolist() for key, value in own.items()
    }
    texts = [born.generate(TEXT, max_new_tokens=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts)


def test_the_auxiliary_loss() -> None:
    """CE(head(s⁰), labels), shifted as the model's own."""
    model = inlay.attach(host("llama", "causal"), Shadow(auxiliary_loss_weight=0.3))
    found = model(TEXT, labels=TEXT)
    with inlay.disabled(model):
        plain = model(TEXT, labels=TEXT)
    (network,) = (p for _, p in adapters_of(model).get("default").pieces() if hasattr(p, "shadow_backbone"))
    logits = model.lm_head(network.shadow_backbone(inputs_embeds=model.model.embed_tokens(TEXT)).last_hidden_state)
    own = F.cross_entropy(logits[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten())
    assert torch.equal(found.logits, plain.logits)
    torch.testing.assert_close(found.loss, plain.loss + 0.3 * own, **CLOSE)
    assert torch.equal(model(TEXT, labels=TEXT, return_dict=False)[0], found.loss)
