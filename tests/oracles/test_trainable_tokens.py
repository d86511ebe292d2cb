"""Trainable tokens against HF peft, alone and inside a LoRA file: outputs, gradients, and files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles.against_peft import Case, born_here, gradients, gradients_of_peft, randomise, run
from oracles.other_methods import both_ways, ids, model, pairs_of_ids, perturbed_peft
from torch import nn

import inlay

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = [9, 3, 14]
Tokens = inlay.TrainableTokens

CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "bert": (Case(model("bert"), ids, {}, Tokens(token_indices=IDS)), {"target_modules": ["word_embeddings"]}),
    "llama, tied": (Case(model("llama", "causal", tie_word_embeddings=True), ids, {}, Tokens(token_indices=IDS)), {}),
    "llama, not tied": (
        Case(model("llama", "causal", tie_word_embeddings=False), ids, {}, Tokens(token_indices=IDS)),
        {"target_modules": ["embed_tokens"]},
    ),
    "gpt2, tied": (
        Case(model("gpt2", "causal"), ids, {}, Tokens(token_indices=IDS)),
        {"target_modules": "transformer.wte"},
    ),
    "gemma, tied and scaled": (Case(model("gemma", "causal"), ids, {}, Tokens(token_indices=IDS)), {}),
    "t5, tied three times": (
        Case(model("t5", "conditional"), pairs_of_ids, {}, Tokens(token_indices=IDS)),
        {"target_modules": ["shared"]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_outputs_gradients_and_files(name: str, tmp_path: Path) -> None:
    case, fields = CASES[name]
    both_ways(case, peft.TrainableTokensConfig(token_indices=IDS, **fields), tmp_path)


INSIDE: dict[str, tuple[Any, Any]] = {
    "llama, tied": (model("llama", "causal", tie_word_embeddings=True), IDS),
    "llama, by name": (model("llama", "causal", tie_word_embeddings=False), {"embed_tokens": IDS}),
    "gpt2": (model("gpt2", "causal"), {"wte": IDS}),
}


def lora_config(build: Any, indices: Any) -> peft.LoraConfig:
    target = "c_attn" if "gpt2" in str(build) else "q_proj"
    return peft.LoraConfig(
        target_modules=[target],
        trainable_token_indices=indices,
        init_lora_weights=False,
        fan_in_fan_out=target == "c_attn",
    )


@pytest.mark.parametrize("name", INSIDE)
def test_inside_a_lora_file_written_here(name: str, tmp_path: Path) -> None:
    build, _ = INSIDE[name]
    target = "c_attn" if "gpt2" in name else "q_proj"
    case = Case(build, ids, {}, [inlay.LoRA(targets=target), Tokens(token_indices=IDS)])
    born_here(case, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert list(config["trainable_token_indices"].values()) == [IDS]
    ours = inlay.attach(build(), case.method)
    randomise(ours)
    inlay.save(ours, tmp_path / "own")
    torch.testing.assert_close(
        run(inlay.load(build(), tmp_path / "own"), ids(), backward=False), run(ours, ids(), backward=False)
    )


@pytest.mark.parametrize("name", INSIDE)
def test_inside_a_lora_file_written_by_peft(name: str, tmp_path: Path) -> None:
    build, indices = INSIDE[name]
    theirs = perturbed_peft(build(), lora_config(build, indices))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    expected, their_gradients = run(theirs, ids()), gradients_of_peft(theirs)
    ours = inlay.load(build(), tmp_path, trainable=True)
    torch.testing.assert_close(run(ours, ids()), expected, rtol=1e-5, atol=1e-5)
    found = gradients(ours)
    assert found.keys() == their_gradients.keys()
    for key, gradient in their_gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-5)


def test_a_head_with_a_bias_keeps_it(tmp_path: Path) -> None:
    # peft 0.21 drops the bias of a tied head, so the formula is the oracle: z = h · E'^T + b.
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.out = nn.Linear(6, 11)
            self.out.weight = self.embed.weight

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.out(torch.tanh(self.embed(input_ids)))
            return result

    model = inlay.attach(Head().eval(), Tokens(targets="embed", token_indices=IDS[:2]))
    randomise(model)
    x = torch.arange(11)[None]
    (value,) = {p for p in model.parameters() if p.requires_grad}
    table = model.embed._parameters["weight"].detach().clone()
    table[IDS[:2]] = value.detach()
    expected = torch.tanh(table[x]) @ table.T + model.out._parameters["bias"]
    torch.testing.assert_close(model(x), expected)
