"""LoRA on a tied embedding and head as one, against HF peft's `ensure_weight_tying` and through files of either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine.tiny import build
from oracles.against_peft import CLOSE, randomise, run
from safetensors.torch import load_file, save_file
from torch import Tensor

import inlay
from inlay import WeightTiedLoRA
from inlay.engine.adapters import adapters_of
from inlay.errors import CheckpointError, ConfigError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
IDS = {"input_ids": torch.arange(3, 17).reshape(2, 7)}
TABLES = {"llama": "embed_tokens", "gpt2": "wte"}
QUERY = {"llama": "q_proj", "gpt2": "c_attn"}


def fresh(name: str) -> Any:
    return build(name, "masked" if name == "bert" else "causal", tie_word_embeddings=True)


def theirs_of(name: str, table: bool) -> Any:
    """peft's model, its A and B moved; those of the head are views of the embedding's.

    peft 0.21.2 ties what is called embed_tokens or lm_head: with GPT-2's wte alone as a target it says nothing is tied.
    """
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[TABLES[name] if table else "lm_head", QUERY[name]],
        ensure_weight_tying=True, fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(fresh(name), config).eval()
    embedding = theirs.get_base_model().get_input_embeddings()
    with torch.no_grad():
        for parameter in (embedding.lora_embedding_A.default, embedding.lora_embedding_B.default):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad and QUERY[name] in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return theirs


def both(theirs: Any) -> tuple[Any, Any]:
    base = theirs.get_base_model()
    return base.get_input_embeddings(), base.get_output_embeddings()


def owner_of(model: Any) -> Any:
    return next(piece for site, piece in adapters_of(model).get("default").pieces() if site.kind == "embedding")


@pytest.mark.parametrize(("name", "table"), [("llama", True), ("llama", False), ("gpt2", False)])
def test_outputs_gradients_and_files_are_hf_pefts(name: str, table: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = theirs_of(name, table)
    expected = run(theirs, IDS)
    embedding, head = both(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = inlay.load(fresh(name), tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(run(ours, IDS), expected, **CLOSE)
    piece = owner_of(ours)
    # peft has each gradient in two halves, of two parameters with one storage
    both_a = embedding.lora_embedding_A.default.grad + head.lora_B.default.weight.grad.T
    both_b = embedding.lora_embedding_B.default.grad + head.lora_A.default.weight.grad.T
    torch.testing.assert_close(piece.lora_A.grad, both_a, **CLOSE)
    torch.testing.assert_close(piece.lora_B.grad, both_b, **CLOSE)
    query = 3 * (32 + (96 if name == "gpt2" else 32))
    assert inlay.summary(ours).trainable_parameters == 2 * query + 3 * (64 + 32)

    inlay.save(ours, tmp_path / "ours")
    left, right = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    back = peft.PeftModel.from_pretrained(fresh(name), tmp_path / "ours").eval()
    torch.testing.assert_close(run(back, IDS, backward=False), expected, **CLOSE)
    assert torch.equal(both(back)[1].lora_A.default.weight.T, both(back)[0].lora_embedding_B.default)

    born = inlay.attach(fresh(name), WeightTiedLoRA(r=2, targets=f"{QUERY[name]},{TABLES[name]}"))
    randomise(born)
    inlay.save(born, tmp_path / "born")
    there = peft.PeftModel.from_pretrained(fresh(name), tmp_path / "born").eval()
    torch.testing.assert_close(run(there, IDS, backward=False), run(born, IDS, backward=False), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_merged_weights_stay_tied(name: str) -> None:
    torch.manual_seed(0)
    model = build("t5", "conditional") if name == "t5" else fresh(name)
    given = {**IDS, "decoder_input_ids": IDS["input_ids"]} if name == "t5" else IDS
    inlay.attach(model, WeightTiedLoRA(r=2))
    randomise(model)
    expected = run(model, given, backward=False)
    tied: Any = (model.get_input_embeddings(), model.get_output_embeddings())
    before = tied[0].inlays.original("weight")
    inlay.merge(model)
    assert tied[0].weight is tied[1].weight
    torch.testing.assert_close(run(model, given, backward=False), expected, **CLOSE)
    inlay.unmerge(model)
    assert tied[0].inlays.original("weight") is tied[1].inlays.original("weight") is before
    inlay.merge(model, keep_base=False)
    assert tied[0].weight is tied[1].weight
    torch.testing.assert_close(run(model, given, backward=False), expected, **CLOSE)


def test_one_step_is_a_step_of_the_table() -> None:
    """Plain autograd of E + s (B A)ᵀ read twice; and peft's parameters come apart when its model is moved."""
    torch.manual_seed(0)
    model = inlay.attach(fresh("llama"), WeightTiedLoRA(r=2, alpha=3, targets="embed"))
    randomise(model)
    piece = owner_of(model)
    a, b = (p.detach().clone().requires_grad_() for p in (piece.lora_A, piece.lora_B))
    base: Any = fresh("llama")
    table = base.lm_head.weight.detach() + 3 / 2 * (b @ a).T
    values: dict[str, Tensor] = {"lm_head.weight": table, "model.embed_tokens.weight": table}
    loss = torch.func.functional_call(base, values, (), {**IDS, "labels": IDS["input_ids"]}, tie_weights=False).loss
    loss.backward()
    model(**IDS, labels=IDS["input_ids"]).loss.backward()
    torch.testing.assert_close(piece.lora_A.grad, a.grad, **CLOSE)
    torch.testing.assert_close(piece.lora_B.grad, b.grad, **CLOSE)

    def tied(one: Any) -> bool:
        embedding, head = both(one)
        return bool(head.lora_A.default.weight.data_ptr() == embedding.lora_embedding_B.default.data_ptr())

    theirs = theirs_of("llama", True)
    assert tied(theirs)
    assert not tied(theirs.double())
    model.double()
    head = model.lm_head.inlays.default.weight_tied_lora
    assert head.lora_A.data_ptr() == owner_of(model).lora_B.data_ptr()


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_that_ties_nothing_is_read_as_what_it_is(dora: bool, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no tied modules are added"):
        theirs = peft.get_peft_model(
            fresh("llama"),
            peft.LoraConfig(
                r=2, target_modules=["q_proj"], init_lora_weights=False, ensure_weight_tying=True, use_dora=dora
            ),
        ).eval()
    theirs.save_pretrained(tmp_path)
    ours = inlay.load(fresh("llama"), tmp_path)
    torch.testing.assert_close(run(ours, IDS, False), run(theirs, IDS, False), **CLOSE)


def test_two_variants_at_once_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True)
    config.save_pretrained(tmp_path)
    save_file({"none": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match="use_dora and ensure_weight_tying"):
        inlay.load(fresh("llama"), tmp_path)


def test_places_that_came_apart_are_refused(tmp_path: Path) -> None:
    model = inlay.attach(fresh("llama"), WeightTiedLoRA(r=2))
    randomise(model)
    inlay.save(model, tmp_path)
    codes = inlay.save(model, tmp_path / "codes", quantise="int8")  # the two copies are rounded apart
    inlay.load(fresh("llama"), codes)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.lm_head.lora_B.weight"
    save_file({**tensors, key: 2 * tensors[key]}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["auto_mapping"].pop("inlay")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="came apart in training"):
        inlay.load(fresh("llama"), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_a": True}, "freeze_a=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"targets": "query"}, "has neither: use LoRA"),
        ({"exclude": "lm_head"}, "lm_head is tied to a place"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    model = fresh("llama")
    with pytest.raises(ConfigError, match=message):
        inlay.attach(model, WeightTiedLoRA(**fields))
    assert "_inlay" not in model.__dict__
