"""Prompt tuning, P-tuning and prefix tuning against HF peft: the same tensors must give the same outputs, losses,
gradients and generated texts, in memory and through the files of either library."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine.small import randomise
from methods.prompt_hosts import TEXT, N, host, padded
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay import PrefixTuning, PromptTuning, PTuning
from inlay.engine.adapters import adapters_of
from inlay.engine.prompts.entry import prompt_of

# peft 0.21 itself calls names that transformers has renamed since.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""fp32 outputs of order 1: the two libraries sum the same products in another order."""
DECODERS = [
    "gpt2",
    "gpt-neox",
    "opt",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "mixtral",
]
ENCODERS = ["bert", "roberta", "electra"]
TASKS = {"causal": "CAUSAL_LM", "conditional": "SEQ_2_SEQ_LM", "sequence": "SEQ_CLS", "trunk": "FEATURE_EXTRACTION"}
CONFIGS = {
    "prompt": (peft.PromptTuningConfig, PromptTuning(num_virtual_tokens=N), {}),
    "p-tuning": (peft.PromptEncoderConfig, PTuning(num_virtual_tokens=N, encoder=None), {"encoder_hidden_size": 8}),
    "prefix": (peft.PrefixTuningConfig, PrefixTuning(num_virtual_tokens=N), {}),
}


def in_peft(model: Any, head: str, kind: str, **fields: Any) -> peft.PeftModel:
    """peft's model, with a prompt of its own, in eval mode."""
    config, _, more = CONFIGS[kind]
    config_of = model.config
    # peft guesses these from names that not every config has, and takes the model's width for the embedding's.
    shape: dict[str, Any] = {}
    if kind != "prefix":
        shape = {"token_dim": model.get_input_embeddings().embedding_dim, "num_attention_heads": 4, "num_layers": 2}
    elif getattr(config_of, "num_key_value_heads", None) and getattr(config_of, "head_dim", None):
        heads = config_of.num_key_value_heads
        shape = {"token_dim": heads * config_of.head_dim, "num_attention_heads": heads}
    return peft.get_peft_model(
        model, config(task_type=TASKS[head], num_virtual_tokens=N, **{**more, **shape, **fields})
    ).eval()


def ours(model: Any, kind: str, vectors: Tensor) -> Any:
    """Our model with peft's tensor."""
    method = CONFIGS[kind][1]
    inlay.attach(model, method, modules_to_save=[])
    method.import_(adapters_of(model).loaded["default"].placed[0], {"prompt_embeddings": vectors.detach().clone()}, {})
    return model


def inputs_for(model: Any, head: str) -> dict[str, Tensor]:
    inputs = padded(model, "right")
    if head in ("causal", "conditional"):
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    elif head == "sequence":
        inputs["labels"] = torch.tensor([0, 1])
    return inputs


def real(output: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits (or hidden states) of the text's real tokens, wherever the output has one for each."""
    values: Tensor = output.logits if "logits" in output else output.last_hidden_state
    length = inputs["attention_mask"].shape[1]
    if values.ndim < 3:
        return values
    values = values[:, -length:]  # peft leaves the prompt's positions in
    return values[inputs["attention_mask"].bool()] if values.shape[1] == length and "labels" not in inputs else values


HOSTS = [
    *[("prompt", name, "causal", "sdpa") for name in DECODERS],
    *[("prompt", name, "sequence", "sdpa") for name in (*ENCODERS, "distilbert", "albert", "deberta-v2", "modernbert")],
    *[("prompt", name, "conditional", "sdpa") for name in ("t5", "bart")],
    *[("prefix", name, "causal", attention) for name in DECODERS for attention in ("sdpa", "eager")],
    *[("prefix", name, "sequence", attention) for name in ENCODERS for attention in ("sdpa", "eager")],
]


@pytest.mark.parametrize(("kind", "name", "head", "attention"), HOSTS)
def test_outputs_losses_and_gradients(kind: str, name: str, head: str, attention: str) -> None:
    model = host(name, head, attention)
    inputs = inputs_for(model, head)
    theirs = in_peft(copy.deepcopy(model), head, kind)
    (weight,) = theirs.prompt_encoder.parameters()
    mine = ours(model, kind, weight[: N if kind == "prompt" else None])
    found, expected = mine(**inputs), theirs(**inputs)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(real(found, inputs), real(expected, inputs), **CLOSE)
    found.loss.backward()
    expected.loss.backward()
    gradients = [parameter.grad for parameter in mine.parameters() if parameter.requires_grad]
    gradient = torch.cat(gradients, dim=-1)  # type: ignore[arg-type]
    torch.testing.assert_close(gradient, weight.grad[: len(gradient)], **CLOSE)
    assert gradient.abs().max() > 1e-4  # what is compared is not rounding


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"do_sample": True}])
@pytest.mark.parametrize(
    ("kind", "name", "head"),
    [(kind, name, "causal") for kind in ("prompt", "prefix") for name in ("gpt2", "opt", "llama")]
    + [("prompt", "t5", "conditional"), ("prompt", "bart", "conditional")],
)
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_generated_texts(kind: str, name: str, head: str, way: dict[str, Any]) -> None:
    model = host(name, head)
    theirs = in_peft(copy.deepcopy(model), head, kind)
    (weight,) = theirs.prompt_encoder.parameters()
    mine = ours(model, kind, weight[: N if kind == "prompt" else None])
    torch.manual_seed(1)
    expected = theirs.generate(input_ids=TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=5, **way)
    torch.manual_seed(1)
    assert torch.equal(mine.generate(TEXT, max_new_tokens=5, **way), expected)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "head"),
    [
        *[(kind, name, "causal") for kind in CONFIGS for name in ("gpt2", "llama", "gemma3")],
        *[(kind, name, "conditional") for kind in ("prompt", "p-tuning") for name in ("t5", "bart")],
        *[(kind, "bert", head) for kind in CONFIGS for head in ("trunk", "sequence")],
    ],
)
def test_files_both_ways(kind: str, name: str, head: str, tmp_path: Path) -> None:
    model = host(name, head)
    inputs = inputs_for(model, head)
    theirs = in_peft(copy.deepcopy(model), head, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HF peft saves no")
        mine = inlay.load(copy.deepcopy(model), tmp_path / "theirs")
    expected = real(theirs(**inputs), inputs)
    torch.testing.assert_close(real(mine(**inputs), inputs), expected, **CLOSE)

    born = inlay.attach(copy.deepcopy(model), CONFIGS[kind][1])
    randomise(born)
    inlay.save(born, tmp_path / "ours")
    if head == "trunk":  # peft guesses the task from a class's name, and trunks have none in theirs
        config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
        (tmp_path / "ours/adapter_config.json").write_text(json.dumps({**config, "task_type": TASKS[head]}))
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    torch.testing.assert_close(real(back(**inputs), inputs), real(born(**inputs), inputs), **CLOSE)
    keys = {"prompt_embeddings"}
    if head == "sequence":
        keys |= {
            "base_model.classifier.weight",
            "base_model.classifier.bias",
        }  # where a prompt is, peft has no `.model`
    assert set(load_file(tmp_path / "theirs/adapter_model.safetensors")) == keys
    assert set(load_file(tmp_path / "ours/adapter_model.safetensors")) == keys


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_peft_prefix_of_an_encoder_decoder_is_read(name: str, layers: int, tmp_path: Path) -> None:
    depth = {"num_layers": layers, "num_decoder_layers": layers} if name == "t5" else {"decoder_layers": layers}
    model = host(name, "conditional", **depth)
    inputs = inputs_for(model, "conditional")
    theirs = in_peft(copy.deepcopy(model), "conditional", "prefix", num_layers=layers)
    theirs.save_pretrained(tmp_path)
    mine = inlay.load(copy.deepcopy(model), tmp_path)
    found, expected = mine(**inputs), theirs(**inputs)
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits), **CLOSE)
    inlay.save(mine, tmp_path / "again")
    again = inlay.load(copy.deepcopy(model), tmp_path / "again")
    assert torch.equal(again(**inputs).logits, found.logits)
    generated = theirs.generate(input_ids=TEXT, max_new_tokens=4)
    assert torch.equal(mine.generate(TEXT, max_new_tokens=4), generated)


@pytest.mark.parametrize(
    "method", [PTuning(num_virtual_tokens=N, hidden_size=5), PrefixTuning(num_virtual_tokens=N, projection_size=5)]
)
def test_peft_reads_what_an_encoder_made(method: Any, tmp_path: Path) -> None:
    model = inlay.attach(host("llama", "causal"), method)
    inlay.save(model, tmp_path)
    assert (tmp_path / "adapter_extra.safetensors").exists()
    theirs = peft.PeftModel.from_pretrained(host("llama", "causal"), tmp_path)
    torch.testing.assert_close(theirs(TEXT).logits[:, -TEXT.shape[1] :], model(TEXT).logits, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "fields", "lost"), [("p-tuning", {}, "encoder"), ("prefix", {"prefix_projection": True}, "projection")]
)
def test_what_peft_loses_is_said(kind: str, fields: dict[str, Any], lost: str, tmp_path: Path) -> None:
    theirs = in_peft(host("gpt2", "causal"), "causal", kind, **{"encoder_hidden_size": 8, **fields})
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"HF peft saves no .*{lost}"):
        mine = inlay.load(host("gpt2", "causal"), tmp_path)
    torch.testing.assert_close(mine(TEXT).logits, theirs(input_ids=TEXT).logits[:, -TEXT.shape[1] :], **CLOSE)


# -- what computes the vectors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "theirs_fields"),
    [
        ({"encoder": "mlp"}, {"encoder_reparameterization_type": "MLP"}),
        ({"encoder": "lstm"}, {"encoder_reparameterization_type": "LSTM"}),
        ({"encoder": "lstm", "num_layers": 1}, {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}),
    ],
)
def test_the_encoders_of_p_tuning_train_alike(fields: dict[str, Any], theirs_fields: dict[str, Any]) -> None:
    model = host("llama", "causal")
    theirs = in_peft(copy.deepcopy(model), "causal", "p-tuning", **theirs_fields)
    inlay.attach(model, PTuning(num_virtual_tokens=N, hidden_size=8, **fields))
    encoder = prompt_of(adapters_of(model).loaded["default"].placed[0])
    pairs = pair(
        encoder,
        theirs.prompt_encoder["default"],
        {"embedding.weight": "embedding", "lstm_head": "lstm", "mlp_head": "mlp"},
    )
    train_alike(model, theirs, pairs)


def test_the_projection_of_a_prefix_trains_alike() -> None:
    model = host("gpt2", "causal")  # whose keys are as wide as the model, as peft needs here
    theirs = in_peft(copy.deepcopy(model), "causal", "prefix", prefix_projection=True, encoder_hidden_size=8)
    inlay.attach(model, PrefixTuning(num_virtual_tokens=N, projection_size=8))
    encoder = theirs.prompt_encoder["default"]
    sources = [piece.source for _, piece in adapters_of(model).loaded["default"].placed[0] if hasattr(piece, "source")]
    with torch.no_grad():
        sources[0].shared.embedding.copy_(encoder.embedding.weight)
        sources[0].shared.hidden.load_state_dict(encoder.transform[0].state_dict())
        for source, weight, bias in zip(
            sources, encoder.transform[2].weight.chunk(2), encoder.transform[2].bias.chunk(2), strict=True
        ):
            source.out.weight.copy_(weight)
            source.out.bias.copy_(bias)
    found, expected = model(TEXT, labels=TEXT), theirs(input_ids=TEXT, labels=TEXT)
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits), **CLOSE)
    found.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(sources[0].shared.embedding.grad, encoder.embedding.weight.grad, **CLOSE)
    torch.testing.assert_close(sources[0].shared.hidden.weight.grad, encoder.transform[0].weight.grad, **CLOSE)
    torch.testing.assert_close(
        torch.cat([source.out.weight.grad for source in sources]), encoder.transform[2].weight.grad, **CLOSE
    )


def pair(encoder: nn.Module, theirs: nn.Module, names: dict[str, str]) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our parameters beside peft's, with the same values."""
    mine, pairs = dict(encoder.named_parameters()), []
    for key, parameter in theirs.named_parameters():
        old = next(old for old in names if key.startswith(old))
        name = key.replace(old, names[old])
        with torch.no_grad():
            mine[name].copy_(parameter)
        pairs.append((mine.pop(name), parameter))
    assert not mine
    return pairs


def train_alike(model: Any, theirs: Any, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    found, expected = model(TEXT, labels=TEXT), theirs(input_ids=TEXT, labels=TEXT)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    found.loss.backward()
    expected.loss.backward()
    for mine, parameter in pairs:
        torch.testing.assert_close(mine.grad, parameter.grad, **CLOSE)
