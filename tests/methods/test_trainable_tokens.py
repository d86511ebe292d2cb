"""Trainable tokens: exactly the chosen rows, in the embedding and in the head tied to it, without a second table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.tiny import build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, UnsupportedError

IDS = (9, 3, 14)
Tokens = inlay.TrainableTokens


def rows(model: nn.Module, name: str = "default") -> nn.Parameter:
    (value,) = adapters_of(model).get(name).parameters()
    return value


def retrain(model: nn.Module, name: str = "default") -> Tensor:
    """Give the rows other values."""
    with torch.no_grad():
        return rows(model, name).normal_().clone()


def test_only_the_chosen_rows_change() -> None:
    model = build("bert")
    ids = torch.arange(64)[None]
    table = model.embeddings.word_embeddings
    base = table(ids)
    inlay.attach(model, Tokens(token_indices=IDS))
    assert inlay.summary(model).trainable_parameters == 3 * 32
    assert torch.equal(table(ids), base)
    value = retrain(model)
    expected = base.clone()
    expected[0, list(IDS)] = value
    assert torch.equal(table(ids), expected)
    table(ids).sum().backward()
    assert torch.equal(rows(model).grad, torch.ones(3, 32))


@pytest.mark.parametrize("name", ["gpt2", "gemma", "t5"])
def test_a_tied_head_follows(name: str) -> None:
    model = build(name, "conditional" if name == "t5" else "causal")
    plain = build(name, "conditional" if name == "t5" else "causal")
    inputs = {"input_ids": torch.arange(16)[None]}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.arange(16)[None]
    inlay.attach(model, Tokens(token_indices=IDS))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    value = retrain(model)
    with torch.no_grad():
        plain.get_input_embeddings().weight[list(IDS)] = value
    # atol: the change of a logit is summed apart from the logit
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-5, atol=1e-4)
    inlay.merge(model)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-5, atol=1e-4)


class Largest(TorchDispatchMode):
    """Counts the new tensors that have as many entries as the table."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        self.found += [
            str(func)
            for t in tree_leaves(output)
            if isinstance(t, Tensor) and t.numel() >= self.size and t.untyped_storage().data_ptr() not in before
        ]
        return output


def test_no_second_table_is_formed() -> None:
    model = inlay.attach(build("gpt2", "causal", vocab_size=4096), Tokens(token_indices=IDS))
    retrain(model)
    with Largest(4096 * 32) as largest:
        model(torch.arange(16)[None]).logits.logsumexp(-1).sum().backward()
    assert largest.found == []
    assert rows(model).grad is not None


def test_two_adapters_the_outer_one_wins() -> None:
    model = build("gpt2", "causal")
    for name in ("first", "second"):
        inlay.attach(model, Tokens(token_indices=IDS), name=name)
        retrain(model, name)
    ids = torch.arange(16)[None]
    both = model(ids).logits
    with inlay.using(model, "second"):
        torch.testing.assert_close(model(ids).logits, both, rtol=1e-5, atol=1e-5)
    with inlay.using(model, "second", "first"):
        assert not torch.allclose(model(ids).logits, both, atol=1e-3)


def test_a_file_of_its_own_and_inside_a_lora_file(tmp_path: Path) -> None:
    def config(folder: Path) -> dict[str, Any]:
        return json.loads((folder / "adapter_config.json").read_text())

    model = inlay.attach(build("gpt2", "causal"), Tokens(token_indices=IDS))
    inlay.save(model, tmp_path / "alone")
    assert config(tmp_path / "alone")["token_indices"] == list(IDS)
    inlay.detach(model)
    inlay.attach(model, [inlay.LoRA(targets="c_attn"), Tokens(token_indices=IDS)])
    inlay.save(model, tmp_path / "inside")
    assert config(tmp_path / "inside")["trainable_token_indices"] == {"wte": list(IDS)}
    inlay.detach(model)
    # peft's TrainableTokensConfig cannot keep a head, so a classifier's tokens are our own kind of file.
    classifier = inlay.attach(build("bert", "sequence"), Tokens(token_indices=IDS))
    inlay.save(classifier, tmp_path / "head")
    assert config(tmp_path / "head")["peft_type"] == "INLAY"


@pytest.mark.parametrize("ids", [(), (1, 1), (-1,), ("a",), (1.0,)])
def test_ids_that_cannot_be(ids: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="each once"):
        Tokens(token_indices=ids)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="no token 64 in wte, which has 64 rows"):
        inlay.attach(build("gpt2"), Tokens(token_indices=(64,)))
    with pytest.raises(UnsupportedError, match="max_norm"):
        inlay.attach(nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)), Tokens(targets="0", token_indices=(1,)))

    class Normed(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.normalize(super().forward(ids))

    with pytest.raises(UnsupportedError, match="a forward of its own"):
        inlay.attach(nn.Sequential(Normed(5, 3)), Tokens(targets="0", token_indices=(1,)))
