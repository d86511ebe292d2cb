"""Adaption prompts against HF peft and against the paper's formula: outputs, gradients, texts, files both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from methods.prompt_hosts import TEXT, N, checkpoint, host, padded
from torch import Tensor

import inlay
from inlay import AdaptionPrompt, PrefixTuning
from inlay.engine.adapters import adapters_of
from inlay.errors import InlayError
from inlay.pieces.prompts.adaption import AdaptionAttention

# peft 0.21 itself calls names that transformers has renamed since.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""fp32: the two libraries project before or after the sum."""


def in_peft(model: Any, layers: int) -> peft.PeftModel:
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=N, adapter_layers=layers)
    theirs = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "adaption" in name:
                parameter.copy_(torch.randn_like(parameter))
    return theirs


def learnt(model: Any) -> dict[str, Any]:
    """Trained parameters by the last part of their names, in the layers' order."""
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"{name.rpartition('.')[2]} {len(found)}"] = parameter
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "layers"), [("llama", 2), ("mistral", 1), ("gpt2", 1)])
def test_both_ways(name: str, layers: int, attention: str, tmp_path: Path) -> None:
    model = host(name, "causal", attention)
    theirs = in_peft(copy.deepcopy(model), layers)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = inlay.load(copy.deepcopy(model), tmp_path / "theirs", trainable=True)
    inputs = {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT), "labels": TEXT}
    found, expected = mine(**inputs), theirs(**inputs)
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits), **CLOSE)
    assert (found.logits - model(TEXT).logits).abs().max() > 1e-2
    found.loss.backward()
    expected.loss.backward()
    pairs = list(zip(learnt(mine).items(), learnt(theirs).items(), strict=True))
    assert len(pairs) == 2 * layers
    for (one, mine_parameter), (other, parameter) in pairs:
        assert one == other
        torch.testing.assert_close(mine_parameter.grad, parameter.grad, **CLOSE)
        assert mine_parameter.grad.abs().max() > 1e-5
    texts = theirs.generate(input_ids=TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=5, num_beams=2)
    assert torch.equal(mine.generate(TEXT, max_new_tokens=5, num_beams=2), texts)
    inlay.save(mine, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    torch.testing.assert_close(back(**inputs).logits, expected.logits, **CLOSE)


@pytest.mark.parametrize(
    ("name", "head"),
    [("llama", "causal"), ("gpt2", "causal"), ("bert", "token"), ("t5", "conditional"), ("opt", "causal")],
)
def test_starts_as_the_base_to_the_bit(name: str, head: str) -> None:
    model = host(name, head)
    inputs = {**padded(model, "right"), **({"labels": TEXT} if name == "t5" else {})}
    base = model(**inputs).logits
    inlay.attach(model, AdaptionPrompt(num_virtual_tokens=N), modules_to_save=[])
    assert torch.equal(model(**inputs).logits, base)


def softly(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("projected", [True, False])
def test_the_formula_in_gpt2(projected: bool) -> None:
    """The paper sends what it adds through the output projection; peft adds it after that, in GPT-2 alone."""
    torch.manual_seed(0)
    model = host("gpt2", "causal")
    base = copy.deepcopy(model).transformer.h[0].attn
    inlay.attach(model, AdaptionPrompt(num_virtual_tokens=N, projected=projected))
    (piece, *_) = (piece for _, piece in adapters_of(model).loaded["default"].pieces())
    assert isinstance(piece, AdaptionAttention)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        piece.adaption_gate.fill_(0.6)
        heads = [part.view(2, 5, 4, 8).transpose(1, 2) for part in base.c_attn(x).split(32, dim=-1)]
        beside = [
            part.view(1, N, 4, 8).transpose(1, 2) for part in base.c_attn(piece.adaption_prompt).split(32, dim=-1)
        ]
        plain = softly(heads[0], heads[1], heads[2], 8**-0.5, causal=True)
        part = 0.6 * softly(heads[0], beside[1], beside[2], 8**-0.5, causal=False)
        plain, part = (one.transpose(1, 2).flatten(2) for one in (plain, part))
        expected = base.c_proj(plain + part) if projected else base.c_proj(plain) + part
        torch.testing.assert_close(model.transformer.h[0].attn(x)[0], expected, **CLOSE)


def moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def test_only_the_papers_form_of_gpt2_is_beyond_peft(tmp_path: Path) -> None:
    import json

    for projected, kind in ((True, "INLAY"), (False, "ADAPTION_PROMPT")):
        model = inlay.attach(host("gpt2", "causal"), AdaptionPrompt(num_virtual_tokens=N, projected=projected))
        folder = inlay.save(moved(model), tmp_path / kind)
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == kind
        assert torch.equal(inlay.load(host("gpt2", "causal"), folder)(TEXT).logits, model(TEXT).logits)


def test_beside_a_prefix_and_under_checkpointing() -> None:
    torch.manual_seed(0)
    model = moved(inlay.attach(host("llama", "causal"), AdaptionPrompt(num_virtual_tokens=N)))
    expected = model(TEXT).logits
    inlay.attach(model, PrefixTuning(num_virtual_tokens=2), name="prefix")
    assert not torch.equal(model(TEXT).logits, expected)
    inlay.detach(model, "prefix")
    assert torch.equal(model(TEXT).logits, expected)
    gradients = []
    for reentrant in (None, False, True):
        checkpoint(model.train(), reentrant)
        if reentrant:
            model.enable_input_require_grads()
        model(TEXT, labels=TEXT).loss.backward()
        gradients.append([p.grad.clone() for p in learnt(model).values()])
        model.zero_grad()
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"num_layers": 3}, "there are 2 attentions"),
        ("llama", {"num_virtual_tokens": 0}, "must be 1 or more"),
        ("llama", {"overrides": {"query": {"num_virtual_tokens": 2}}}, "has no overrides"),
        ("qwen3", {}, "AdaptionPrompt needs an attention that projects keys and values and no more"),
        ("gpt-neox", {}, "AdaptionPrompt needs an attention that projects keys and values and no more"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    model = host(name, "causal")
    before = list(model.state_dict())
    with pytest.raises(InlayError, match=message):
        inlay.attach(model, AdaptionPrompt(**{"num_virtual_tokens": N, **fields}))
    assert list(model.state_dict()) == before
