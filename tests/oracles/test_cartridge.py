"""Cartridges against HF peft: outputs, gradients, texts, files both ways; started from a text, and composed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from methods.prompt_hosts import PROMPT, TEXT, N, host
from peft.tuners.cartridge.utils import compose_cartridge_adapters, initialize_kv_prefix_from_past_key_values

import inlay
from inlay import Cartridge
from inlay.errors import InlayError

# peft 0.21 itself calls names that transformers has renamed since.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def in_peft(model: Any, frozen: int = 1, seed: int = 0) -> peft.PeftModel:
    torch.manual_seed(seed)
    heads = getattr(model.config, "num_key_value_heads", 4)
    config = peft.CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, num_frozen_tokens=frozen, token_dim=8 * heads,
        num_attention_heads=heads,
    )  # fmt: skip
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_both_ways(name: str, frozen: int, tmp_path: Path) -> None:
    model = host(name, "causal")
    theirs = in_peft(copy.deepcopy(model), frozen)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = inlay.load(copy.deepcopy(model), tmp_path / "theirs", trainable=True)
    inputs = {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT), "labels": TEXT}
    found, expected = mine(**inputs), theirs(**inputs)
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits), **CLOSE)
    found.loss.backward()
    expected.loss.backward()
    gradient = torch.cat([p.grad for p in mine.parameters() if p.requires_grad], dim=-1)  # type: ignore[misc]
    assert gradient.shape[0] == N - frozen
    torch.testing.assert_close(gradient, theirs.prompt_encoder["default"].trainable_embedding.grad, **CLOSE)
    assert gradient.abs().max() > 1e-4
    texts = theirs.generate(input_ids=TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=5)
    assert torch.equal(mine.generate(TEXT, max_new_tokens=5), texts)
    inlay.save(mine, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    torch.testing.assert_close(back(**inputs).logits, expected.logits, **CLOSE)
    assert torch.equal(inlay.load(model, tmp_path / "ours")(**inputs).logits, found.logits)


def test_starts_as_the_model_that_has_read_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = host("llama", "causal")
    theirs = in_peft(copy.deepcopy(model))
    cache = model(PROMPT[None], use_cache=True).past_key_values
    legacy = [(layer.keys, layer.values) for layer in cache.layers]
    initialize_kv_prefix_from_past_key_values(theirs, past_key_values=legacy)
    monkeypatch.setattr("inlay.pieces.prompts.prefix_source.token_encoder", lambda *_: lambda text: PROMPT.tolist())
    mine = inlay.attach(copy.deepcopy(model), Cartridge(num_virtual_tokens=N, init="text", text="a corpus"))
    found = mine(TEXT).logits
    torch.testing.assert_close(found, theirs(input_ids=TEXT, attention_mask=torch.ones_like(TEXT)).logits, **CLOSE)
    read = model(torch.cat((PROMPT.expand(2, -1), TEXT), dim=1)).logits[:, N:]
    torch.testing.assert_close(found, read, **CLOSE)


def test_the_frozen_rows_stay() -> None:
    model = inlay.attach(host("llama", "causal"), Cartridge(num_virtual_tokens=N))
    rows = [m for m in model.modules() if hasattr(m, "frozen") and hasattr(m, "prefix")]
    before = [m().detach().clone() for m in rows]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    model(TEXT, labels=TEXT).loss.backward()
    optimizer.step()
    for module, start in zip(rows, before, strict=True):
        assert torch.equal(module()[:1], start[:1])
        assert (module()[1:] != start[1:]).all()


def test_active_together_they_are_what_peft_composes(tmp_path: Path) -> None:
    model = host("llama", "causal")
    for seed in (1, 2):
        in_peft(copy.deepcopy(model), seed=seed).save_pretrained(tmp_path / str(seed))
    compose_cartridge_adapters([tmp_path / "1", tmp_path / "2"], output_path=tmp_path / "both")
    composed = inlay.load(copy.deepcopy(model), tmp_path / "both")(TEXT).logits
    for name in ("1", "2"):
        inlay.load(model, tmp_path / name, name)
    inlay.activate(model, "1", "2")
    torch.testing.assert_close(model(TEXT).logits, composed, **CLOSE)


def test_one_starts_from_another_and_learns_from_a_teacher(tmp_path: Path) -> None:
    """Self-study in small: the teacher has the whole text's keys and values, the student fewer rows."""
    teacher = inlay.attach(host("llama", "causal"), Cartridge(num_virtual_tokens=2 * N))
    folder = str(inlay.save(teacher, tmp_path))
    same = inlay.attach(host("llama", "causal"), Cartridge(num_virtual_tokens=2 * N, init_from=folder))
    assert torch.equal(same(TEXT).logits, teacher(TEXT).logits)
    student = inlay.attach(host("llama", "causal"), Cartridge(num_virtual_tokens=N, distil_from=folder)).train()
    logits = student(TEXT).logits
    (controller,) = inlay.controllers(student)
    expected = (logits - teacher(TEXT).logits).square().mean()
    torch.testing.assert_close(controller.extra_loss(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frozen_tokens": N}, "from 0 to 2, so that there is a row to train"),
        ({"num_frozen_tokens": -1}, "from 0 to 2"),
        ({"projection_size": 4}, "has no projection_size"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InlayError, match=message):
        Cartridge(**{"num_virtual_tokens": N, **fields})
