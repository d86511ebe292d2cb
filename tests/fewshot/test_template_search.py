"""Template search: the exact best texts where everything can be tried, under a model of known distribution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fewshot.seq2seq_toys import Planted, t5_tokenizer
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from inlay.errors import ConfigError, DataError
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.searches.template_search import Blanks, Filler, Form, forms_for, search_templates, sentinels

EXAMPLES = [("It", "", "great"), ("was", "a", "bad"), ("a It", "", "great")]


def enumerated(filler: Filler, examples: Sequence[tuple[str, str, str]], most: int) -> Iterator[Blanks]:
    """Every pair of texts of at most `most` tokens, each scored by running it through the model alone."""
    x, y, z = filler.sentinels
    said = sorted(filler.texts)
    inputs = [filler.inputs(*example) for example in examples]
    for count in range(most + 1):
        for tokens, cut in itertools.product(itertools.product(said, repeat=count), range(count + 1)):
            first, second = tokens[:cut], tokens[cut:]
            if any(
                filler.texts[a] == "." == filler.texts[b] for p in (first, second) for a, b in itertools.pairwise(p)
            ):
                continue
            decoder, targets = [0, x, *first, y, *second], [*first, y, *second]
            logits = []
            for ids in inputs:
                states = filler.model.get_encoder()(torch.tensor([ids]), torch.ones(1, len(ids)))[0]
                logits.append(
                    filler.model(SimpleNamespace(last_hidden_state=states), torch.ones(1, len(ids)),
                                 torch.tensor([decoder])).logits[0, 1:].double()
                )  # fmt: skip
            each = torch.stack(logits)
            sums = filler.combine == "logprob_sum"
            scores = each.log_softmax(-1).sum(0) if sums else each.mean(0).log_softmax(-1)
            total = sum(float(scores[place, token]) for place, token in enumerate(targets))
            yield Blanks(first, second, total + max(float(scores[-1, end]) for end in (z, 1)))


@pytest.mark.parametrize("combine", ["logprob_sum", "logit_mean"])
def test_equals_exhaustive_enumeration(combine: Any) -> None:
    tokenizer = t5_tokenizer(("It", "was", "great", "bad", "a"))
    filler = Filler(Planted(len(tokenizer)), tokenizer, 3, combine=combine)  # type: ignore[arg-type]
    filler.texts = {token: text for token, text in filler.texts.items() if text in ("It", "was", ".")}
    with torch.no_grad():
        expected = sorted(enumerated(filler, EXAMPLES, 3), key=lambda one: -one.score)
    assert len(expected) == 142 - 2 - 16  # minus those with two full stops in a row: of 2 tokens, of 3
    found = filler.search(EXAMPLES, beam=10_000)
    assert [(one.first, one.second) for one in found] == [(one.first, one.second) for one in expected]
    torch.testing.assert_close(
        torch.tensor([one.score for one in found]), torch.tensor([one.score for one in expected]), atol=1e-4, rtol=1e-5
    )
    narrow = filler.search(EXAMPLES, beam=4)
    known = {(one.first, one.second): one.score for one in expected}
    assert len(narrow) == 4
    assert all(one.score == pytest.approx(known[one.first, one.second], abs=1e-4) for one in narrow)


def test_one_example_is_the_same_in_both_ways_and_several_are_not() -> None:
    tokenizer = t5_tokenizer()
    model = Planted(len(tokenizer), seed=3)
    for count, same in ((1, True), (3, False)):
        sums, means = (
            Filler(model, tokenizer, 2, combine=combine).search(EXAMPLES[:count], beam=5)  # type: ignore[arg-type]
            for combine in ("logprob_sum", "logit_mean")
        )
        assert ([one.score for one in sums] == pytest.approx([one.score for one in means])) is same


def test_a_real_t5_scores_what_is_found_the_same() -> None:
    tokenizer = t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        config = T5Config(vocab_size=len(tokenizer) + 5, decoder_start_token_id=0, **shape)  # type: ignore[arg-type]
        model = T5ForConditionalGeneration(config).eval()
    filler = Filler(model, tokenizer, 3)
    x, y, z = filler.sentinels
    for one in filler.search(EXAMPLES, beam=3):
        total = 0.0
        for example in EXAMPLES:
            labels = torch.tensor([[x, *one.first, y, *one.second, z]])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([filler.inputs(*example)]), labels=labels).logits[0]
            log_probs = logits.double().log_softmax(-1)
            end = float(torch.maximum(log_probs[-1, z], log_probs[-1, 1]))
            total += sum(float(log_probs[at, labels[0, at]]) for at in range(1, len(labels[0]) - 1)) + end
        assert one.score <= total + 1e-4  # one end for all examples; the best of each alone is no less
        assert one.score == pytest.approx(total, abs=1.0)


@pytest.mark.parametrize("sign", ["", "▁"])
def test_the_planted_template_is_found(sign: str) -> None:
    """A model that says "It was" at <X> and "." at <Y>, whatever it reads."""
    tokenizer = t5_tokenizer(sign=sign)
    x, y, z = sentinels(tokenizer)
    it, was, stop = (tokenizer.get_vocab()[token] for token in ("▁It", "▁was", "."))
    model = Planted(len(tokenizer))
    behind = {x: it, it: was, was: y, y: stop, stop: z}
    with torch.no_grad():
        for table in model.tables:
            table.zero_()
        model.out.zero_()
        for place, (last, said) in enumerate(behind.items()):
            model.tables[1][last, place] = 9.0
            model.out[place, said] = 5.0
    rows, words = [{"text": "a"}, {"text": "was a"}], ["great", "bad"]
    found = search_templates(model, tokenizer, rows, words, forms_for(["text"]), beam=4, n=6)  # type: ignore[arg-type]
    assert [one.source for one in found[:2]] == ["{text} It was {mask}.", "It was {mask}. {text}"]
    assert len(found) == len(set(found)) == 6
    pair = search_templates(
        model, tokenizer, [{"p": "It was a.", "h": "Bad"}], ["bad"], forms_for(["p", "h"]), beam=2, n=1  # type: ignore[arg-type]
    )[0]  # fmt: skip
    assert pair == Template("{p|strip_punctuation} It was {mask}. {h|lower_first}")


def test_what_the_encoder_reads() -> None:
    tokenizer = t5_tokenizer()
    filler = Filler(Planted(len(tokenizer)), tokenizer, max_length=8)  # type: ignore[arg-type]
    x, y, _ = filler.sentinels
    ids = {word: tokenizer.get_vocab()[f"▁{word}"] for word in ("It", "was", "great", "bad", "a")}
    assert filler.inputs("It was", "a", "great") == [ids["It"], ids["was"], x, ids["great"], y, ids["a"], 1]
    cut = filler.inputs("It was a a a a", "a bad", "great")
    assert cut == [ids["It"], ids["was"], x, ids["great"], y, ids["a"], ids["bad"], 1]
    assert filler.inputs("<extra_id_0>", "", "great").count(x) == 1


def test_what_is_never_said_and_how_texts_become_templates() -> None:
    tokenizer = t5_tokenizer(("It", "was", "{great}"))
    filler = Filler(Planted(len(tokenizer)), tokenizer)  # type: ignore[arg-type]
    assert sorted(filler.texts.values()) == [".", "It", "was", "{great}"]
    ids = tokenizer.get_vocab()
    braces = Blanks((ids["▁It"], ids["▁{great}"]), (), 0.0)
    made = filler.template(Form("{text}"), braces)
    assert made is not None
    assert made.source == "{text} It {{great}} {mask}"
    assert str(made.render({"text": "a"})) == "a It {great} [mask]"
    assert filler.template(Form("", "{text}"), Blanks((), (), 0.0)) == Template("{mask} {text}")
    assert filler.template(Form("{text}"), Blanks((ids["."],), (ids["▁was"],), 0.0)) == Template("{text}. {mask} was")
    assert filler.template(Form("{text}"), Blanks((ids["."], ids["."]), (), 0.0)) is None


def test_what_cannot_be_searched_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="no tokens <extra_id_0>"):
        Filler(Planted(9), tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="either logprob_sum or logit_mean"):
        Filler(Planted(9), t5_tokenizer(), combine="mean")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="give at least one"):
        search_templates(Planted(9), t5_tokenizer(), [], [], forms_for(["a"]))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there are 3: say which forms"):
        forms_for(["a", "b", "c"])
