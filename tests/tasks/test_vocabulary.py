"""Trimming a vocabulary: text of kept tokens is computed as before, whatever the tokenizer and the decoder."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks.trimmed_hosts import CORPUS, ENGLISH, HAUSA, HOSTS, OTHERS, SWAHILI, made
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import inlay
from inlay.errors import AdapterError, ConfigError, DataError, UnsupportedError
from inlay.tasks.loading import quiet
from inlay.tasks.vocabulary import Trimmed, script

TEXTS = HAUSA + SWAHILI


@pytest.fixture(scope="module")
def hosts() -> dict[str, tuple[Any, Any]]:
    """Each host whole."""
    return {name: made(name) for name in HOSTS}


@pytest.fixture(scope="module")
def trimmed(hosts: dict[str, tuple[Any, Any]]) -> dict[str, Trimmed]:
    """Each cut to Hausa and Swahili."""
    return {
        name: inlay.trim_vocabulary(copy.deepcopy(model), tokenizer, TEXTS)
        for name, (model, tokenizer) in hosts.items()
    }


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    given = torch.tensor([ids])
    with torch.no_grad():
        decoder = {"decoder_input_ids": given} if model.config.is_encoder_decoder else {}
        found: torch.Tensor = model(input_ids=given, **decoder).logits[0]
        return found


def mixtures(count: int) -> list[str]:
    """New sentences of the same words."""
    draw, words = random.Random(0), " ".join(TEXTS).split()
    return [" ".join(draw.choices(words, k=6)) for _ in range(count)]


@pytest.mark.parametrize("name", HOSTS)
def test_text_of_kept_tokens_is_computed_as_before(
    name: str, hosts: dict[str, tuple[Any, Any]], trimmed: dict[str, Trimmed]
) -> None:
    (model, tokenizer), small = hosts[name], trimmed[name]
    assert len(small.kept) == len(small.tokenizer) < len(tokenizer)
    compared = 0
    for text in [*TEXTS, *mixtures(30)]:
        before, after = tokenizer(text)["input_ids"], small.tokenizer(text)["input_ids"]
        if text not in TEXTS and not set(before) <= set(small.kept):
            continue
        assert small.renumber(before) == after
        assert small.tokenizer.decode(after) == tokenizer.decode(before)
        compared += 1
        if compared <= 4:
            old, new = logits(model, before), logits(small.model, after)
            assert new.shape[-1] == len(small.kept)
            torch.testing.assert_close(new, old[:, list(small.kept)], atol=1e-6, rtol=1e-6)
    assert compared > len(TEXTS) + 5


@pytest.mark.parametrize("name", HOSTS)
def test_saved_and_read_again_it_is_the_same(name: str, trimmed: dict[str, Trimmed], tmp_path: Path) -> None:
    small = trimmed[name]
    with quiet():
        small.model.save_pretrained(tmp_path)
        small.tokenizer.save_pretrained(tmp_path)
        model = type(small.model).from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == small.tokenizer.get_vocab()
    for text in TEXTS[:3]:
        ids = tokenizer(text)["input_ids"]
        assert ids == small.tokenizer(text)["input_ids"]
        assert torch.equal(logits(model, ids), logits(small.model, ids))


@pytest.mark.parametrize("name", HOSTS)
def test_ties_sizes_and_ids(name: str, hosts: dict[str, tuple[Any, Any]], trimmed: dict[str, Trimmed]) -> None:
    (model, tokenizer), small = hosts[name], trimmed[name]
    rows = len(small.kept)
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, small.model)]
    assert tied[0] == tied[1]
    assert small.model.config.vocab_size == rows == small.model.get_input_embeddings().num_embeddings
    for token in ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "cls_token", "sep_token"):
        if getattr(tokenizer, f"{token}_id") is not None:
            assert getattr(small.tokenizer, token) == getattr(tokenizer, token)
            assert small.kept[getattr(small.tokenizer, f"{token}_id")] == getattr(tokenizer, f"{token}_id")
    pairs = [(getattr(one, kind, None) for one in (small.model, model)) for kind in ("config", "generation_config")]
    for config, old in pairs:
        for entry, value in vars(old).items() if old is not None else ():
            if entry.endswith("_token_id") and isinstance(value, int) and value < model.config.vocab_size:
                assert small.kept[getattr(config, entry)] == value, entry
    held = {id(p): p for p in small.model.parameters()}.values()
    assert small.bytes_after == sum(t.nbytes for t in [*held, *small.model.buffers()]) < small.bytes_before
    assert not any(model.config.vocab_size in p.shape for p in held)
    assert f"{rows:,} of {model.config.vocab_size:,} tokens kept; 100.00%" in str(small)


@pytest.mark.parametrize("name", HOSTS)
def test_other_text_is_spelt_with_what_is_left(name: str, trimmed: dict[str, Trimmed]) -> None:
    """New words of the same letters are never unknown; bytes spell everything."""
    small = trimmed[name]
    unknown = small.tokenizer.unk_token_id
    assert unknown not in small.tokenizer("nadogai rafidagi", add_special_tokens=False)["input_ids"]
    if name in ("llama", "gpt2", "bart"):
        for text in OTHERS + ENGLISH:
            ids = small.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert small.tokenizer.decode(ids).strip() == text
    assert logits(small.model, small.tokenizer(OTHERS[0])["input_ids"]).isfinite().all()


@pytest.mark.parametrize("name", HOSTS)
def test_any_choice_of_tokens_splits_its_own_texts_as_before(name: str, hosts: dict[str, tuple[Any, Any]]) -> None:
    """The claim itself, for each text alone: whatever part of the vocabulary its tokens are."""
    model, tokenizer = hosts[name]
    for text in [*CORPUS[: len(CORPUS) // 3 : 3], "the thieves 1984"]:
        small = inlay.trim_vocabulary(copy.deepcopy(model), tokenizer, [text])
        assert small.renumber(tokenizer(text)["input_ids"]) == small.tokenizer(text)["input_ids"]


def test_min_count_drops_rare_tokens_but_keeps_their_characters(hosts: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = hosts["xlm_roberta"]
    often = inlay.trim_vocabulary(copy.deepcopy(model), tokenizer, TEXTS, min_count=2)
    every = inlay.trim_vocabulary(copy.deepcopy(model), tokenizer, TEXTS)
    assert set(often.kept) < set(every.kept)
    assert often.share is not None
    assert 0.5 < often.share < 1
    assert tokenizer.unk_token_id not in often.tokenizer(TEXTS[-1])["input_ids"]
    assert often.tokenizer.decode(often.tokenizer(TEXTS[-1], add_special_tokens=False)["input_ids"]) == TEXTS[-1]


@pytest.mark.parametrize("name", ["xlm_roberta", "gpt2", "bert"])
def test_scripts(name: str, hosts: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = hosts[name]
    small = inlay.trim_vocabulary(copy.deepcopy(model), tokenizer, scripts=["Latin"])
    for text in TEXTS + ENGLISH:
        assert small.renumber(tokenizer(text)["input_ids"]) == small.tokenizer(text)["input_ids"]
    letters = {letter for token in small.tokenizer.get_vocab() for letter in token}
    pieces = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    if isinstance(pieces, list):  # Unigram: the lowest score stays, whose piece varies as the tokenizer is trained
        letters -= set(min(pieces, key=lambda piece: piece[1])[0])
    assert "д" not in letters
    assert small.share is None
    more = inlay.trim_vocabulary(copy.deepcopy(model), tokenizer, OTHERS[:1], scripts=["latin"])
    assert set(small.kept) < set(more.kept)


def test_the_script_of_a_letter() -> None:
    found = [script(letter) for letter in "aɗẹд早እש1!▁\u0301"]
    assert found == ["LATIN", "LATIN", "LATIN", "CYRILLIC", "CJK", "ETHIOPIC", "HEBREW", None, None, None, None]


def test_tokens_kept_by_name_and_generation_lists() -> None:
    model, tokenizer = made("llama")
    token = tokenizer.tokenize("throne")[-1]
    row = tokenizer.convert_tokens_to_ids(token)
    first = inlay.trim_vocabulary(made("llama")[0], tokenizer, HAUSA, keep=[token])
    other = next(number for number in range(len(tokenizer)) if number not in first.kept)
    model.generation_config.suppress_tokens = [row, other]
    model.generation_config.bad_words_ids = [[row], [other, row]]
    small = inlay.trim_vocabulary(model, tokenizer, HAUSA, keep=[token])
    assert small.model.generation_config.suppress_tokens == [small.kept.index(row)]
    assert small.model.generation_config.bad_words_ids == [[small.kept.index(row)]]
    prompt = small.tokenizer("na gode", return_tensors="pt")
    assert small.model.generate(**prompt, max_new_tokens=3, do_sample=False).max() < len(small.kept)


def test_a_trimmed_model_takes_an_adapter_and_trains(trimmed: dict[str, Trimmed]) -> None:
    model = copy.deepcopy(trimmed["bert"].model)
    inlay.attach(model, inlay.LoRA(r=2, targets="all-linear"))
    ids = torch.tensor([trimmed["bert"].tokenizer(HAUSA[0])["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_tokens_that_generation_is_told_of_move_with_the_rest(hosts: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = copy.deepcopy(hosts["bart"][0]), hosts["bart"][1]
    often = tokenizer("gida", add_special_tokens=False)["input_ids"]
    usual = inlay.trim_vocabulary(copy.deepcopy(model), tokenizer, HAUSA).kept
    rare, gone = sorted({*range(len(tokenizer))} - {*usual})[-2:]
    told = model.generation_config
    told.forced_decoder_ids = [[1, rare], [2, None]]
    told.force_words_ids = [often, [rare]]
    told.sequence_bias = [[often, 0.5], [[gone], 2.0]]
    small = inlay.trim_vocabulary(model, tokenizer, HAUSA)
    assert rare in small.kept
    assert gone not in small.kept
    assert told.forced_decoder_ids == [[1, small.kept.index(rare)], [2, None]]
    assert told.force_words_ids == [small.renumber(often), [small.kept.index(rare)]]
    assert told.sequence_bias == [[small.renumber(often), 0.5]]


def test_tokens_put_around_a_text_are_kept_whatever_the_tokenizer_calls_them() -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "fill", "ina", "kwana", "start", "yau", "end"]
    made = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    around = processors.TemplateProcessing(single="start $A end", special_tokens=[("start", 7), ("end", 9)])
    made.post_processor = around
    made.enable_padding(pad_id=4, pad_token="fill")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
    config = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    small = inlay.trim_vocabulary(BertForMaskedLM(config), tokenizer, ["ina yau"])
    assert {4, 7, 9} <= set(small.kept)
    assert 6 not in small.kept
    ids = small.tokenizer("ina yau")["input_ids"]
    assert small.tokenizer.convert_ids_to_tokens(ids) == ["start", "ina", "yau", "end"]


def test_bad_input_changes_nothing(hosts: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = copy.deepcopy(hosts["bert"][0]), hosts["bert"][1]
    before = json.dumps([str(model.config), sorted((k, v.sum().item()) for k, v in model.state_dict().items())])
    for error, words, arguments in (
        (ConfigError, "needs texts, or scripts", {}),
        (DataError, "is one string", {"texts": "a"}),
        (DataError, "holds a int, 3", {"texts": ["a", 3]}),
        (DataError, "holds no text", {"texts": []}),
        (ConfigError, "min_count=0", {"texts": ["a"], "min_count": 0}),
        (ConfigError, "'Latn', which is no script; did you mean 'Latin'", {"scripts": ["Latn"]}),
        (ConfigError, "is one string: give a list", {"scripts": "Latin"}),
        (ConfigError, "keep names 'zzz'", {"texts": ["a"], "keep": ["zzz"]}),
    ):
        with pytest.raises(error, match=words):
            inlay.trim_vocabulary(model, tokenizer, **arguments)
    with pytest.raises(ConfigError, match="ids up to"):
        inlay.trim_vocabulary(model, hosts["gpt2"][1], ["a"])
    inlay.attach(model, inlay.LoRA(r=2))
    with pytest.raises(AdapterError, match="detach it first"):
        inlay.trim_vocabulary(model, tokenizer, ["a"])
    inlay.detach(model)
    assert before == json.dumps([str(model.config), sorted((k, v.sum().item()) for k, v in model.state_dict().items())])
    with pytest.raises(UnsupportedError, match="no fast tokenizer"):
        inlay.trim_vocabulary(model, object(), ["a"])
    with pytest.raises(DataError, match="was not kept"):
        inlay.trim_vocabulary(model, tokenizer, ["a"]).renumber([len(tokenizer) - 1])
