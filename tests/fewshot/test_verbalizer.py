"""Labels' words are tokens of the tokenizer, cut where they stand in the template."""

from __future__ import annotations

import random

import pytest
import torch
from fewshot import toys
from transformers import PreTrainedTokenizerFast

from inlay.errors import ConfigError, DataError
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer, word_tokens
from inlay.fewshot.scorers.mask import MaskScorer

WORDS = Verbalizer({"neg": "terrible", "pos": ["great", "good"]})


def only(verbalizer: Verbalizer, tokenizer: PreTrainedTokenizerFast, source: str) -> dict[str, list[list[str]]]:
    found = verbalizer.tokens(tokenizer, Template(source))
    return {label: [tokenizer.convert_ids_to_tokens(list(ids)) for ids in words] for label, words in found.items()}


@pytest.mark.parametrize("source", ["{text} It was {mask}.", "{text} {mask}", "all {mask} of {text}"])
def test_a_word_behind_a_space_is_one_token_in_every_family(
    source: str, any_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = WORDS.tokens(any_tokenizer, Template(source))
    assert [[len(ids) for ids in words] for words in found.values()] == [[1], [1, 1]]
    assert [any_tokenizer.decode(found["pos"][n]).strip() for n in range(2)] == ["great", "good"]


@pytest.mark.parametrize(
    "source", ["{text} It was {mask*}.", "{text} ({mask*})", "{mask*}: {text}", "{text}{sep}{mask*}"]
)
def test_words_in_place_of_masks_are_the_tokens_of_the_filled_string(
    source: str, any_tokenizer: PreTrainedTokenizerFast
) -> None:
    template = Template(source)
    for word in ("good", "xyz", "world news", "bc great", "Q-9"):
        ids = list(word_tokens(word, any_tokenizer, template.before_mask()))
        row, sep = {"text": "c a"}, str(any_tokenizer.sep_token)
        asked = str(template.render(row, masks=len(ids))).replace("[mask]", any_tokenizer.mask_token)
        before = any_tokenizer(asked.replace("[sep]", sep))["input_ids"]
        first = before.index(any_tokenizer.mask_token_id)
        filled = any_tokenizer(str(template.render(row, fill=word)).replace("[sep]", sep))["input_ids"]
        assert filled[first : first + len(ids)] == ids
        assert filled[:first] == before[:first]


def test_families_differ_where_no_space_is() -> None:
    plain = only(Verbalizer({"x": "good"}), toys.wordpiece(), "({mask}) {text}")
    assert plain == {"x": [["good"]]}
    with pytest.raises(ConfigError, match=r"'good' \(for the label 'x'\) is 4 tokens"):
        only(Verbalizer({"x": "good"}), toys.byte_level(), "({mask}) {text}")


def test_more_tokens_than_masks_name_word_and_pieces(tokenizer: PreTrainedTokenizerFast) -> None:
    words = Verbalizer({"neg": "terrible", "pos": "goodly"})
    with pytest.raises(ConfigError, match=r"'goodly' \(for the label 'pos'\) is 3 tokens .*write \{mask\*\}"):
        words.tokens(tokenizer, Template("{text} {mask}"))
    with pytest.raises(ConfigError, match="choose words of 2 tokens"):
        WORDS.tokens(tokenizer, Template("{text} {mask*2}"))
    assert len(words.tokens(tokenizer, Template("{text} {mask*}"))["pos"][0]) == 3


def test_words_of_two_labels_must_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="stands for both 'a' and 'b'"):
        Verbalizer({"a": "good", "b": ["bad", " good "]})
    lower = toys.wordpiece()
    lower.backend_tokenizer.normalizer = type(lower.backend_tokenizer.normalizer)(lowercase=True)
    with pytest.raises(ConfigError, match="are the same tokens"):
        Verbalizer({"a": "Good", "b": "good"}).tokens(lower, Template("{text} {mask}"))


def test_words_of_one_label_that_are_the_same_tokens_count_once() -> None:
    lower = toys.wordpiece()
    lower.backend_tokenizer.normalizer = type(lower.backend_tokenizer.normalizer)(lowercase=True)
    words = {"neg": ["bad", "Bad", "awful"], "pos": "good"}
    assert only(Verbalizer(words), lower, "{text} {mask}") == {"neg": [["bad"], ["awful"]], "pos": [["good"]]}
    logits = torch.randn(len(lower), generator=torch.Generator().manual_seed(0))
    scorer = MaskScorer(tokenizer=lower, template=Template("{text} {mask}"), verbalizer=Verbalizer(words))
    bad, awful = (logits[lower.convert_tokens_to_ids(word)] for word in ("bad", "awful"))
    found = scorer.scores(toys.everywhere(logits), [{"text": "a"}])[0, 0]
    torch.testing.assert_close(found, (bad + awful) / 2)


def test_a_demonstration_of_a_label_without_words() -> None:
    assert Verbalizer({"a": ["one", "two"]}).spoken("a") == "one"
    with pytest.raises(DataError, match=r"the label 'b'.*; the labels are: a"):
        Verbalizer({"a": "one"}).spoken("b")


def test_unknown_words_are_an_error(any_tokenizer: PreTrainedTokenizerFast) -> None:
    if any_tokenizer.convert_tokens_to_ids("Ã") != any_tokenizer.unk_token_id:
        assert word_tokens("好", any_tokenizer)  # bytes know everything
        return
    with pytest.raises(ConfigError, match="does not know the word '好'"):
        word_tokens("好", any_tokenizer)


def test_token_0_is_a_word_like_any_other() -> None:
    tokenizer = toys.wordpiece(first=["great"])
    assert word_tokens("great", tokenizer) == (0,)
    scorer = MaskScorer(
        tokenizer=tokenizer,
        template=Template("{text} {mask}"),
        verbalizer=Verbalizer({"n": "bad", "p": ["great", "good"]}),
    )
    logits = torch.zeros(len(tokenizer))
    logits[0] = 5.0
    scores = scorer.scores(toys.everywhere(logits), [{"text": "b"}])
    torch.testing.assert_close(scores, torch.tensor([[0.0, 2.5]]))


@pytest.mark.parametrize("words", [3, [3], [], "", None, ["good", ""]])
def test_words_are_text(words: object) -> None:
    with pytest.raises(ConfigError, match="the label 'c' has no word: give it one as text, such as c=good"):
        Verbalizer({"a": "yes", "c": words})  # type: ignore[dict-item]


def test_labels_in_the_order_of_the_data() -> None:
    words = Verbalizer({"a": "yes", "b": "no"})
    assert words.for_labels(["b", "a"]).labels == ("b", "a")
    with pytest.raises(ConfigError, match="the label 'c' has no word"):
        words.for_labels(["a", "b", "c"])
    with pytest.raises(ConfigError, match="which is no label of the data"):
        words.for_labels(["a"])


def test_the_command_lines_spelling() -> None:
    assert Verbalizer.parse(["neg=terrible", "pos=great, good"]) == WORDS
    for wrong in (["neg"], ["=x"], ["a=x", "a=y"], ["a="], ["a= , "]):
        with pytest.raises(ConfigError):
            Verbalizer.parse(wrong)


def test_remapping_keeps_the_other_labels() -> None:
    assert WORDS.remapped({"neg": "bad"}).words == {"neg": ("bad",), "pos": ("great", "good")}


def test_random_verbalizers_never_share_tokens(any_tokenizer: PreTrainedTokenizerFast) -> None:
    draw = random.Random(0)
    for _ in range(20):
        words = draw.sample(toys.WORDS, 6)
        found = Verbalizer({"a": words[:3], "b": words[3:]}).tokens(any_tokenizer, Template("{text} is {mask}"))
        assert len({ids for listed in found.values() for ids in listed}) == 6
