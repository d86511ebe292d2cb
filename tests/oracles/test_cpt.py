"""CPT against HF peft: outputs, losses and gradients while training, files both ways; and its loss by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from methods.prompt_hosts import TEXT, host
from torch import Tensor
from torch.nn import functional

import inlay
from inlay import CPT
from inlay.engine.adapters import adapters_of
from inlay.engine.prompts.entry import prompt_of
from inlay.errors import ConfigError, InlayError, UnsupportedError

# peft 0.21 itself calls names that transformers has renamed since.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""fp32, after steps of descent that carry roundings on."""
IDS = (7, 9, 12, 30, 8, 11, 45, 50, 3, 0)
TYPES = (1, 2, 3, 4, 5, 6, 7, 8, 8, 0)
N = len(IDS)
METHOD = CPT(token_ids=IDS, token_types=TYPES, epsilon=3.0, format_epsilon=1.0, loss_decay=0.7)


def in_peft(model: Any) -> peft.PeftModel:
    config = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=list(IDS), cpt_tokens_type_mask=list(TYPES), cpt_mask=[1] * N,
        opt_projection_epsilon=3.0, opt_projection_format_epsilon=1.0, opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.7,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def call(**more: Tensor) -> dict[str, Tensor]:
    labels = TEXT.clone()
    labels[0, :3] = -100
    return {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT), "labels": labels, **more}


def delta(model: Any) -> Any:
    return prompt_of(adapters_of(model).loaded["default"].placed[0]).delta


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_trains_as_in_peft_and_files_go_both_ways(name: str, tmp_path: Path) -> None:
    base = host(name, "causal")
    theirs, mine = in_peft(copy.deepcopy(base)), inlay.attach(copy.deepcopy(base), METHOD)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1.0) for m in (mine, theirs)]
    other = theirs.prompt_encoder["default"].delta_embedding.weight
    for _ in range(3):
        found, expected = mine(**call()), theirs(**call())
        torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
        torch.testing.assert_close(found.logits, expected.logits[:, N:], **CLOSE)
        for output, optimizer in ((found, optimizers[0]), (expected, optimizers[1])):
            optimizer.zero_grad()
            output.loss.backward()
        torch.testing.assert_close(delta(mine).grad, other.grad, **CLOSE)
        for optimizer in optimizers:
            optimizer.step()
        for controller in inlay.controllers(mine):
            controller.after_step(optimizers[0])
    final = mine(TEXT).logits
    torch.testing.assert_close(theirs(input_ids=TEXT).logits[:, N:], final, **CLOSE)
    radius = torch.tensor([0, 1, 3, 1])[torch.tensor(TYPES) % 4] * (32 / 2048) ** 0.5
    moved = delta(mine).norm(dim=1)
    assert (moved <= radius * (1 + 1e-6)).all()
    torch.testing.assert_close(moved.max(), radius.max(), rtol=1e-5, atol=0)  # some reached the edge

    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(inlay.load(copy.deepcopy(base), tmp_path / "theirs")(TEXT).logits, final, **CLOSE)
    inlay.save(mine, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(back(input_ids=TEXT).logits[:, N:], final, **CLOSE)
    again = inlay.load(copy.deepcopy(base), tmp_path / "ours", trainable=True)
    assert torch.equal(again(TEXT).logits, final)
    assert torch.equal(delta(again), delta(mine))  # the balls are still where they were


def test_starts_as_the_base_that_reads_the_examples() -> None:
    base = host("llama", "causal")
    mine = inlay.attach(copy.deepcopy(base), METHOD)
    long = torch.cat((torch.tensor(IDS).expand(2, -1), TEXT), dim=1)
    torch.testing.assert_close(mine(TEXT).logits, base(long).logits[:, N:], rtol=1e-5, atol=1e-5)
    seen = {"attention_mask": torch.ones_like(long), "max_new_tokens": 4}  # one of the tokens is that of padding
    assert torch.equal(mine.generate(TEXT, max_new_tokens=4), base.generate(long, **seen)[:, N:])


def by_hand(logits: Tensor, labels: Tensor, weights: list[float]) -> Tensor:
    """logits and labels of the whole sequence; `weights` by position, 0 where there is no label."""
    weight = torch.tensor(weights)[1:].expand(2, -1) * (labels[:, 1:] != -100)
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:].clamp(min=0), reduction="none")
    return (losses * weight).sum() / (weight > 0).sum()


def test_the_loss_by_hand() -> None:
    base = host("llama", "causal")
    mine = inlay.attach(copy.deepcopy(base), METHOD)
    long = torch.cat((torch.tensor(IDS).expand(2, -1), TEXT), dim=1)
    labels = torch.cat((torch.tensor(IDS).expand(2, -1), call()["labels"]), dim=1)
    # The label of the first example, then the two tokens of the second one's, then the text.
    weights = [0, 0, 0, 0.49, 0, 0, 0, 0.7, 0.7, 0, *[1.0] * TEXT.shape[1]]
    found = mine(**call()).loss
    torch.testing.assert_close(found, by_hand(base(long).logits, labels, weights), rtol=1e-5, atol=1e-6)
    total = torch.tensor(20)  # labels of all batches of a step
    share = (call()["labels"][:, 1:] != -100).sum() / total
    torch.testing.assert_close(mine(**call(), num_items_in_batch=total).loss, found * share)


def test_the_text_counts_whatever_the_types_where_peft_leaves_it_out() -> None:
    """With types that are no multiple of four at the end (its default, all 1), peft takes the text for a template."""
    base = host("llama", "causal")
    config = peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=list(IDS))
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    assert theirs(**call()).loss.isnan()
    mine = inlay.attach(copy.deepcopy(base), CPT(token_ids=IDS))
    long = torch.cat((torch.tensor(IDS).expand(2, -1), TEXT), dim=1)
    expected = base(long, labels=torch.cat((torch.full((2, N), -100), call()["labels"]), dim=1)).loss
    torch.testing.assert_close(mine(**call()).loss, expected, rtol=1e-5, atol=1e-6)


def test_types_of_the_text_are_the_callers_own() -> None:
    mine = inlay.attach(host("llama", "causal"), METHOD)
    types = torch.full_like(TEXT, 4)
    types[:, :4] = 2
    before = types.clone()
    labels = call()["labels"].masked_fill(types != 4, -100)
    torch.testing.assert_close(mine(**call(input_type_mask=types)).loss, mine(**call(labels=labels)).loss)
    assert torch.equal(types, before)  # peft adds to the caller's tensor


@pytest.mark.parametrize(
    ("fields", "name", "message"),
    [
        ({"token_ids": ()}, "llama", "give the tokens of at least one example"),
        ({"token_types": (1, 2)}, "llama", "10 token_ids need as many token_types"),
        ({"epsilon": -1}, "llama", "0 or more"),
        ({"targets": "query"}, "llama", "has no targets"),
        ({"token_ids": (3, 64)}, "llama", "the model has the tokens 0 to 63"),
        ({}, "t5", "an encoder–decoder does not"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], name: str, message: str) -> None:
    model = host(name, "conditional" if name == "t5" else "causal")
    before = list(model.state_dict())
    with pytest.raises(InlayError, match=message):
        inlay.attach(model, CPT(**{"token_ids": IDS, **fields}))
    assert list(model.state_dict()) == before


def test_only_language_models_have_such_labels() -> None:
    model = inlay.attach(host("bert", "sequence"), CPT(token_ids=IDS))
    with pytest.raises(UnsupportedError, match="CPT trains causal language models"):
        model(TEXT, labels=torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="has no targets"):
        CPT(token_ids=IDS, layers=0)
