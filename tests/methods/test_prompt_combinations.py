"""Prompts that are added onto the text, several prompts in one batch, and several one before the other: against the
base model reading the embeddings that these amount to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from methods.prompt_hosts import LENGTH, TEXT, N, host, padded, prompt_of
from torch import Tensor

import inlay
from inlay import PromptTuning
from inlay.errors import UnsupportedError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""The same sums over the same keys, in another order of rows."""


# -- added -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), [("bert", "sequence"), ("llama", "causal"), ("t5", "conditional")])
def test_an_added_prompt_is_added_to_the_first_tokens(name: str, head: str) -> None:
    model = host(name, head)
    base = copy.deepcopy(model)
    inlay.attach(model, PromptTuning(num_virtual_tokens=N, position="added"), modules_to_save=[])
    more = {"labels": TEXT} if head == "conditional" else {}
    assert torch.equal(model(TEXT, **more).logits, base(TEXT, **more).logits)  # it starts at zero
    with torch.no_grad():
        prompt_of(model).normal_()
    encoder = base.get_encoder() if head == "conditional" else base
    embeds = encoder.get_input_embeddings()(TEXT)
    embeds[:, :N] += prompt_of(model).detach()
    expected = base(inputs_embeds=embeds, **more).logits
    torch.testing.assert_close(model(TEXT, **more).logits, expected, **CLOSE)
    plain = encoder.get_input_embeddings()(TEXT)
    torch.testing.assert_close(model(inputs_embeds=plain, **more).logits, expected, **CLOSE)


def test_an_added_prompt_skips_padding_and_follows_generation() -> None:
    model = host("llama", "causal")
    inlay.attach(model, PromptTuning(num_virtual_tokens=8, position="added", init="random"))
    alone = model.generate(TEXT[1:, :-2], max_new_tokens=6)
    for way in ({}, {"use_cache": False}, {"num_beams": 1, "cache_implementation": "static"}):
        found = model.generate(**padded(model, "left"), max_new_tokens=6, **way)
        assert torch.equal(found[1, 2:], alone[0]), way


# -- ensembles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["logits", "log_probabilities"])
@pytest.mark.parametrize(("name", "head"), [("bert", "sequence"), ("gpt2", "causal"), ("t5", "conditional")])
def test_an_ensemble_is_the_mean_of_its_prompts(name: str, head: str, combine: Any) -> None:
    model = host(name, head)
    labels = torch.tensor([0, 1]) if head == "sequence" else TEXT
    single = inlay.attach(copy.deepcopy(model), PromptTuning(num_virtual_tokens=N), modules_to_save=[])
    method = PromptTuning(num_virtual_tokens=N, ensemble=2, combine=combine, init="random")
    inlay.attach(model, method, modules_to_save=[])
    logits, losses, gradients = [], [], []
    for part in prompt_of(model).detach().split(N):
        with torch.no_grad():
            prompt_of(single).copy_(part)
        single.zero_grad()
        output = single(TEXT, labels=labels)
        (output.loss / 2).backward()
        logits.append(output.logits.detach() if combine == "logits" else output.logits.detach().log_softmax(-1))
        losses.append(output.loss.detach())
        gradients.append(prompt_of(single).grad)
    found = model(TEXT, labels=labels)
    found.loss.backward()
    torch.testing.assert_close(found.logits, torch.stack(logits).mean(0), **CLOSE)
    torch.testing.assert_close(found.loss, torch.stack(losses).mean(), **CLOSE)
    torch.testing.assert_close(prompt_of(model).grad, torch.cat(gradients), **CLOSE)


@pytest.mark.parametrize(("name", "head"), [("llama", "causal"), ("bart", "conditional")])
def test_an_ensemble_generates(name: str, head: str) -> None:
    model = host(name, head)
    inlay.attach(model, PromptTuning(num_virtual_tokens=N, ensemble=3, init="random"))
    inputs = padded(model, "left" if head == "causal" else "right")
    found = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=4, use_cache=False))
    assert found.shape[0] == 2
    beam = model.generate(**inputs, max_new_tokens=4, num_beams=2, use_cache=False)
    assert beam.shape[0] == 2
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        model.generate(**inputs, max_new_tokens=4, num_beams=2)


# -- beside other adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), [("llama", "causal"), ("t5", "conditional")])
def test_two_prompts_stand_one_before_the_other(name: str, head: str) -> None:
    model = host(name, head)
    for adapter, position in (("inner", "prepended"), ("outer", "prepended"), ("added", "added")):
        inlay.attach(model, PromptTuning(num_virtual_tokens=N, position=position, init="random"), adapter)  # type: ignore[arg-type]
    base = copy.deepcopy(model)
    inlay.detach(base)
    vectors = {
        adapter: next(p for n, p in model.named_parameters() if f".{adapter}." in n).detach()
        for adapter in ("inner", "outer", "added")
    }
    encoder = base.get_encoder() if head == "conditional" else base
    text = encoder.get_input_embeddings()(TEXT)
    more = {"labels": TEXT} if head == "conditional" else {}

    def expected(*parts: Tensor) -> Tensor:
        logits: Tensor = base(inputs_embeds=torch.cat(parts, dim=1), **more).logits
        return logits[:, -LENGTH:]

    inner, outer = (vectors[adapter].expand(2, N, -1) for adapter in ("inner", "outer"))
    for order, parts in ((("inner", "outer"), (inner, outer, text)), (("outer", "inner"), (outer, inner, text))):
        inlay.activate(model, *order)
        torch.testing.assert_close(model(TEXT, **more).logits, expected(*parts), **CLOSE)
    inlay.activate(model, "outer", "added")
    marked = torch.cat((text[:, :N] + vectors["added"], text[:, N:]), dim=1)
    torch.testing.assert_close(model(TEXT, **more).logits, expected(outer, marked), **CLOSE)
    if head == "causal":
        inlay.activate(model, "inner", "outer")
        cached = model.generate(TEXT, max_new_tokens=4)
        assert torch.equal(cached, model.generate(TEXT, max_new_tokens=4, use_cache=False))
    with inlay.disabled(model):
        assert torch.equal(model(TEXT, **more).logits, base(TEXT, **more).logits)
