"""`train.chunked_loss`: the same losses and gradients on whole models, no logits, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train.test_cache import SIZES, Ran, bert, collate, features, gpt2
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import inlay
from inlay.errors import ConfigError
from inlay.train.head_loss import ChunkedHeadLoss
from inlay.train.trainer import Trainer


def llama(**changes: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **{**SIZES, **changes}))


def step(model: nn.Module, chunked: bool, **inputs: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    """(loss, gradients by name, outputs) of one training forward."""
    batch = {**collate(features("llama")[:6]), **inputs}

    def forward(inputs: Any) -> Any:
        outputs = model(**inputs)
        return outputs.loss, outputs

    trainer: Any = SimpleNamespace(adapted=model, args=SimpleNamespace(label_smoothing_factor=0))
    around: Any = ChunkedHeadLoss()
    loss, outputs = around(trainer, forward, batch) if chunked else forward(batch)
    model.zero_grad()
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, outputs


@pytest.mark.parametrize("items", [{}, {"num_items_in_batch": torch.tensor(9)}, {"num_items_in_batch": 9}])
@pytest.mark.parametrize(
    ("make", "method", "trained"),
    [
        (llama, inlay.LoRA(r=2), "lora"),
        (lambda: llama(tie_word_embeddings=True), inlay.LoRA(r=2), "lora"),
        (llama, inlay.FrozenFeatures(head="lm_head"), "lm_head"),
        (lambda: llama(tie_word_embeddings=True), inlay.FrozenFeatures(head="lm_head"), "embed_tokens"),
        (gpt2, inlay.LoRA(r=2), "lora"),
        (gpt2, inlay.FullFineTuning(), "wte"),
        (llama, inlay.PromptTuning(num_virtual_tokens=3), "prompt"),
    ],
)
def test_loss_and_gradients_are_the_models_own(
    make: Callable[[], nn.Module], method: Any, trained: str, items: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    model = inlay.attach(make(), method).train()
    for parameter in model.parameters():  # LoRA's B starts at 0, and A would have no gradient to compare
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    torch.manual_seed(2)
    loss, gradients, outputs = step(model, False, **items)
    torch.manual_seed(2)
    chunked, found, without = step(model, True, **items)
    assert outputs.logits is not None
    assert without.logits is None
    # fp32 sums of 40 classes and some 30 tokens in another order.
    torch.testing.assert_close(chunked, loss, rtol=1e-6, atol=0)
    assert found.keys() == gradients.keys()
    assert any(trained in name for name in found)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max() + 1))
    assert model(**collate(features("llama")[:2])).logits.shape[-1] == 40  # the model is as it was


def test_a_run_has_the_losses_of_the_plain_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str) -> Ran:
        torch.manual_seed(1)
        return Ran(tmp_path / name, llama(), inlay.LoRA(r=2, layers=[2]), "llama", gradient_accumulation_steps=2)

    plain = run("plain")
    made = Trainer.__init__

    def with_chunks(self: Trainer, *, around: Any, **rest: Any) -> None:
        made(self, around=[ChunkedHeadLoss(), *around], **rest)

    monkeypatch.setattr(Trainer, "__init__", with_chunks)
    chunked = run("chunked")
    torch.testing.assert_close(chunked.losses, plain.losses, rtol=1e-5, atol=0)
    assert chunked.cache.states is not None  # the two stand around each other


class OwnLoss(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(input_ids, attention_mask).logits
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.view(-1, 40), labels.flatten()), logits=logits)


@pytest.mark.parametrize(
    ("make", "method", "why"),
    [
        (bert, inlay.LoRA(r=2), "BertForSequenceClassification is no causal language model"),
        (llama, inlay.LoRA(r=2, targets="lm_head"), "the output head of LlamaForCausalLM is adapted: take it out"),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(vocab_size=40, head_dim=8, num_key_value_heads=2, **SIZES)),
            inlay.LoRA(r=2),
            "Gemma2ForCausalLM does more to its logits",
        ),
        (
            lambda: GraniteForCausalLM(GraniteConfig(vocab_size=40, logits_scaling=2.0, **SIZES)),
            inlay.LoRA(r=2),
            "GraniteForCausalLM does more to its logits",
        ),
        (lambda: OwnLoss(LlamaConfig(vocab_size=40, **SIZES)), inlay.LoRA(r=2), "does not compute its loss from"),
    ],
)
def test_what_it_cannot_stand_for_is_refused_and_left_as_it_was(
    make: Callable[[], nn.Module], method: Any, why: str
) -> None:
    model = inlay.attach(make(), method).train()
    rows = "bert" if isinstance(model, type(bert())) else "llama"
    with pytest.raises(ConfigError, match=r"train\.chunked_loss=true cannot be used: ") as caught:
        step(model, True, **collate(features(rows)[:6]))
    assert why in str(caught.value)
    head: Any = model.get_output_embeddings() if rows == "llama" else None  # type: ignore[operator]
    assert head is None or "forward" not in vars(head)
    assert not hasattr(model, "_loss_function")
    assert torch.isfinite(model(**collate(features(rows)[:6])).loss)


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(adapted=llama(), args=SimpleNamespace(label_smoothing_factor=0.1))
    with pytest.raises(ConfigError, match="label_smoothing_factor needs the logits of every class"):
        ChunkedHeadLoss()(trainer, lambda inputs: (torch.zeros(()), {}), {})


def test_the_setting_reaches_the_run() -> None:
    from inlay.train.options import Options
    from inlay.train.training import around_forward

    kinds = [type(around).__name__ for around in around_forward(Options(chunked_loss=True), print)]
    assert kinds == ["ChunkedHeadLoss", "FrozenCache"]
    assert len(around_forward(Options(), print)) == 1
