"""Prompt tuning, against the base model reading the prompt's own tokens: a prompt that holds the embeddings of the
tokens P must do to a text x what the base does to [P; x], in every output and in every way of generating."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from methods.prompt_hosts import LENGTH, PROMPT, TEXT, N, before, checkpoint, host, padded, prompt_of, without_dropout
from torch import Tensor

import inlay
from inlay import PromptTuning
from inlay.engine.prompts.entry import encoder_of
from inlay.engine.prompts.virtual_tokens import PromptEntry
from inlay.errors import ConfigError, UnsupportedError

DECODERS = ["gpt2", "gpt-neox", "opt", "llama", "mistral", "qwen2", "gemma", "gemma3", "phi", "deepseek-v3"]
ENCODERS = ["bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "modernbert", "t5"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""The same sums over the same keys, in another order of rows."""


def reading(model: Any, **fields: Any) -> Any:
    """The model with a prompt that holds what it computes for the tokens PROMPT, and the model as it was."""
    base = copy.deepcopy(model)
    encoder = encoder_of(model) or model
    vectors: Tensor = encoder.get_input_embeddings()(PROMPT).detach()
    inlay.attach(model, PromptTuning(num_virtual_tokens=N, init="zeros", **fields), modules_to_save=[])
    with torch.no_grad():
        prompt_of(model).copy_(vectors)
    return model, base


# -- the same as reading the prompt's tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_reads_the_prompt_before_its_text(name: str) -> None:
    model, base = reading(host(name, "causal"))
    labels = TEXT.masked_fill(TEXT == 40, -100)
    found = model(TEXT, labels=labels, output_hidden_states=True)
    expected = base(before(TEXT), labels=before(labels, -100), output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits[:, N:], **CLOSE)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    assert [h.shape[1] for h in found.hidden_states] == [LENGTH] * len(expected.hidden_states)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_reads_the_prompt_before_its_text(name: str) -> None:
    model, base = reading(host(name, "token"))
    inputs, labels = padded(model, "right"), TEXT % 2
    found = model(**inputs, labels=labels)
    long = {"input_ids": before(inputs["input_ids"]), "attention_mask": before(inputs["attention_mask"], 1)}
    expected = base(**long, labels=before(labels, -100))
    torch.testing.assert_close(found.logits, expected.logits[:, N:], **CLOSE)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_reads_the_prompt_before_the_source(name: str) -> None:
    model, base = reading(host(name, "conditional"))
    inputs = padded(model, "right")
    long = {"input_ids": before(inputs["input_ids"]), "attention_mask": before(inputs["attention_mask"], 1)}
    found, expected = model(**inputs, labels=TEXT), base(**long, labels=TEXT)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    encoded = model.get_encoder()(**inputs)
    torch.testing.assert_close(
        model(encoder_outputs=encoded, attention_mask=inputs["attention_mask"], labels=TEXT).logits, found.logits
    )


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "prefill in chunks": {"prefill_chunk_size": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_decoder_generates_as_after_the_prompt(name: str, way: str) -> None:
    model, base = reading(host(name, "causal"))
    text = TEXT[:1] if way == "prompt lookup" else TEXT
    torch.manual_seed(1)
    found = model.generate(text, max_new_tokens=5, **WAYS[way])
    torch.manual_seed(1)
    expected = base.generate(before(text), max_new_tokens=5, **WAYS[way])
    assert torch.equal(found, expected[:, N:])


@pytest.mark.parametrize("way", ["greedy", "without a cache", "beam", "sampling"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_generates_as_after_the_prompt(name: str, way: str) -> None:
    model, base = reading(host(name, "conditional"))
    inputs = padded(model, "right")
    long = {"input_ids": before(inputs["input_ids"]), "attention_mask": before(inputs["attention_mask"], 1)}
    torch.manual_seed(1)
    found = model.generate(**inputs, max_new_tokens=5, **WAYS[way])
    torch.manual_seed(1)
    assert torch.equal(found, base.generate(**long, max_new_tokens=5, **WAYS[way]))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma3"])
def test_left_padding_changes_nothing(name: str) -> None:
    model, _ = reading(host(name, "causal"))
    found = model.generate(**padded(model, "left"), max_new_tokens=5)
    alone = model.generate(TEXT[1:, :-2], max_new_tokens=5)
    assert torch.equal(found[1, -5:], alone[0, -5:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_pools_the_right_token_of_padded_text(side: str) -> None:
    model, _ = reading(host("llama", "sequence"))
    inputs = padded(model, side)
    if side == "left":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(model(**inputs).logits[1:], model(TEXT[1:, :-2]).logits, **CLOSE)


def test_a_model_that_pools_the_largest_id_is_not_misled() -> None:
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model, base = reading(transformers.CLIPTextModel(config).eval().requires_grad_(False))
    text = TEXT.clone()
    text[0, 3] = text[1, 5] = 63  # old CLIP checkpoints end their texts with the largest id
    torch.testing.assert_close(model(text).pooler_output, base(before(text)).pooler_output, **CLOSE)


def test_spans_choices_tuples_and_embeddings() -> None:
    model, base = reading(host("bert", "question"))
    ends = {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 5])}
    expected = base(before(TEXT), **{name: value + N for name, value in ends.items()})
    found = model(TEXT, **ends)
    torch.testing.assert_close((found.loss, found.end_logits), (expected.loss, expected.end_logits[:, N:]), **CLOSE)
    as_tuple = model(TEXT, torch.ones_like(TEXT), torch.zeros_like(TEXT), **ends, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[2], found.end_logits, **CLOSE)
    embedded = model(inputs_embeds=base.get_input_embeddings()(TEXT))
    torch.testing.assert_close(embedded.start_logits, found.start_logits, **CLOSE)
    model, base = reading(host("bert", "choice"))
    choices = TEXT.view(1, 2, LENGTH)
    torch.testing.assert_close(model(choices).logits, base(before(choices)).logits, **CLOSE)
    model, base = reading(host("llama", "causal"))
    some = torch.tensor([1, 4])
    torch.testing.assert_close(model(TEXT, logits_to_keep=some).logits, base(before(TEXT)).logits[:, some + N], **CLOSE)
    torch.testing.assert_close(model(TEXT, logits_to_keep=2).logits, base(before(TEXT)).logits[:, -2:], **CLOSE)


def test_the_head_does_not_score_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = reading(host("llama", "causal"))
    seen = list[int]()
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    embedded = base.get_input_embeddings()(TEXT)
    for inputs in ({"input_ids": TEXT}, {"inputs_embeds": embedded}):
        found = model(**inputs, labels=TEXT)
        expected = base(before(TEXT), labels=before(TEXT, -100))
        torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits[:, N:]), **CLOSE)
        torch.testing.assert_close(model(**inputs, logits_to_keep=0).logits, found.logits, **CLOSE)
        model(**inputs)
    # The place before the text foretells its first token; a caller who says 0 gets all, as ever.
    assert seen == [LENGTH + 1, LENGTH + N, LENGTH] * 2
    inlay.attach(model, PromptTuning(num_virtual_tokens=2, init="zeros"), name="second")
    inlay.activate(model, "default", "second")
    seen.clear()
    found = model(TEXT, labels=TEXT)
    assert seen == [LENGTH + 3] or seen == [LENGTH + N + 1]  # all but the inner one's
    monkeypatch.setattr(PromptEntry, "scores_prompt", True)
    expected = model(TEXT, labels=TEXT)
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits), **CLOSE)
    assert seen[-1] == LENGTH + N + 2


# -- ways of running ---------------------------------------------------------------------------------------------------


def test_the_prompt_is_stored_once_and_stays_shared() -> None:
    model, base = reading(host("bart", "conditional"))
    keys = [key for key in model.state_dict() if "inlays" in key]
    assert keys == ["model.encoder.embed_tokens.inlays.default.prompt_tuning.prompt.prompt"]
    expected = model(TEXT, labels=TEXT).logits
    embeds = base.get_encoder().get_input_embeddings()(TEXT)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TEXT, labels=TEXT).logits, expected)
        with torch.no_grad():
            prompt_of(other).zero_()
        by_ids, by_embeddings = other(TEXT, labels=TEXT), other(inputs_embeds=embeds, labels=TEXT)
        assert not torch.equal(by_ids.logits, expected)
        torch.testing.assert_close(by_ids.logits, by_embeddings.logits, **CLOSE)
    assert torch.equal(model(TEXT, labels=TEXT).logits, expected)
    inlay.detach(model)
    assert model.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("position", ["prepended", "added"])
@pytest.mark.parametrize(("name", "head"), [("bert", "sequence"), ("llama", "causal"), ("bart", "conditional")])
def test_checkpointing_and_compiling_change_nothing(name: str, head: str, position: Any) -> None:
    model = without_dropout(host(name, head, use_cache=False))
    inlay.attach(
        model, PromptTuning(num_virtual_tokens=N, position=position, ensemble=2, init="random"), modules_to_save=[]
    )
    inputs = {**padded(model, "right"), "labels": torch.tensor([0, 1]) if head == "sequence" else TEXT}

    def gradient(run: Any) -> Tensor:
        model.zero_grad()
        run(**inputs).loss.backward()
        found = prompt_of(model).grad
        assert found is not None
        return found.clone()

    expected = gradient(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(gradient(compiled), expected, **CLOSE)
    model.train()
    for reentrant in (True, False):
        checkpoint(model, reentrant)
        torch.testing.assert_close(gradient(model), expected, **CLOSE)
        checkpoint(model, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # bf16 keeps 8 bits: gradients of order 0.01 to 1 agree to a few percent of the largest.
        assert (gradient(model) - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_half_precision_model_trains_fp32_vectors() -> None:
    model = host("llama", "causal").to(torch.bfloat16)
    inlay.attach(model, PromptTuning(num_virtual_tokens=N))
    output = model(TEXT, labels=TEXT)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert prompt_of(model).dtype == prompt_of(model).grad.dtype == torch.float32  # type: ignore[union-attr]


# -- how it starts, and files ------------------------------------------------------------------------------------------


def tokenizer(folder: Path) -> str:
    """A tokenizer of words, saved in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({word: i + 5 for i, word in enumerate(["good", "bad", "is", "this", "a", "film", "very"])})
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


def test_initial_vectors(tmp_path: Path) -> None:
    name = tokenizer(tmp_path)

    def vectors(host_name: str = "llama", **fields: Any) -> tuple[Tensor, Tensor]:
        model = host(host_name, "causal")
        table = model.get_input_embeddings()(torch.arange(64))
        inlay.attach(model, PromptTuning(num_virtual_tokens=4, **fields))
        return prompt_of(model).detach(), table

    found, table = vectors(init="text", text="this is a film", tokenizer=name)
    assert torch.equal(found, table[[8, 7, 9, 10]])
    found, table = vectors("gemma3", init="text", text="this is", tokenizer=name)  # it scales its embeddings
    assert torch.equal(found, table[[8, 7, 8, 7]])
    found, table = vectors(init="labels", labels=("good", "very bad"), tokenizer=name)
    torch.testing.assert_close(found[:2], torch.stack((table[5], table[[11, 6]].mean(0))))
    found, table = vectors(ensemble=2)
    assert found.shape == (8, 32)
    assert all(any(torch.equal(row, token) for token in table) for row in found)
    found, table = vectors(init="random", ensemble=16)
    assert found.std() == pytest.approx(float(table.std()), rel=0.1)  # 2,048 draws: the estimate is within 2%


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "1 or more"),
        ({"ensemble": 0}, "1 or more"),
        ({"position": "appended"}, "choose prepended or added"),
        ({"combine": "votes"}, "choose logits or log_probabilities"),
        ({"init": "texts"}, "choose one of"),
        ({"text": "a film"}, "only used with init='text'"),
        ({"labels": ("a",)}, "only used with init='labels'"),
        ({"init": "text"}, "needs text="),
        ({"init": "text", "text": "a film", "ensemble": 2}, "needs text=, 2 texts"),
        ({"init": "text", "text": "a film", "tokenizer": "/nowhere"}, "pass tokenizer="),
        ({"init": "labels"}, "does not name its labels"),
        ({"targets": "q_proj"}, "no targets"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_changes(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = host("bert", "sequence")
    keys, name = list(model.state_dict()), tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=message):
        inlay.attach(model, PromptTuning(**{"num_virtual_tokens": 2, "tokenizer": name, **fields}))
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("fields", [{}, {"position": "added"}, {"ensemble": 2}, {"init": "text", "text": "a film"}])
def test_the_file_brings_back_the_same_model(fields: dict[str, Any], tmp_path: Path) -> None:
    words = tokenizer(tmp_path / "words")
    model = host("bert", "sequence")
    more = {"tokenizer": words} if "text" in fields else {}
    inlay.attach(model, PromptTuning(num_virtual_tokens=N, **fields, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    inlay.save(model, tmp_path / "adapter")
    for file in (tmp_path / "words").iterdir():
        file.unlink()  # what a prompt started from is not needed to read it
    other = inlay.load(host("bert", "sequence"), tmp_path / "adapter")
    assert torch.equal(other(TEXT).logits, model(TEXT).logits)


@pytest.mark.parametrize(("position", "ensemble"), [("prepended", 1), ("added", 1), ("prepended", 3)])
def test_parameters_are_those_of_the_formula(position: Any, ensemble: int) -> None:
    model = host("albert", "masked")
    inlay.attach(model, PromptTuning(num_virtual_tokens=N, position=position, ensemble=ensemble))
    assert inlay.summary(model).trainable_parameters == ensemble * N * 16  # 16: width of ALBERT's token embedding


# -- what it cannot do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), [("vit", "image"), ("whisper", "conditional"), ("wav2vec2", "ctc")])
def test_models_that_read_no_tokens_are_refused(name: str, head: str) -> None:
    with pytest.raises(UnsupportedError, match="reads token ids"):
        inlay.attach(host(name, head), PromptTuning())


def test_recurrent_models_are_refused() -> None:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedError, match="recurrent state"):
        inlay.attach(transformers.MambaForCausalLM(config), PromptTuning())


def test_calls_that_a_prompt_does_not_fit_are_refused() -> None:
    model = inlay.attach(host("llama", "causal"), PromptTuning(num_virtual_tokens=N))
    with pytest.raises(UnsupportedError, match="static cache"):
        model.generate(TEXT, max_new_tokens=2, cache_implementation="static")  # type: ignore[operator]
    with pytest.raises(UnsupportedError, match="attention_mask"):
        model(TEXT, attention_mask=torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool))
    first = model.generate(TEXT, max_new_tokens=2, return_dict_in_generate=True)  # type: ignore[operator]
    longer = torch.cat((first.sequences, TEXT), dim=1)
    with pytest.raises(UnsupportedError, match="earlier cache"):
        model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=2)  # type: ignore[operator]
    model = inlay.attach(host("bert", "sequence"), PromptTuning(num_virtual_tokens=36))
    with pytest.raises(ConfigError, match="shorten the texts to 4 tokens"):  # 40 positions
        model(TEXT)
