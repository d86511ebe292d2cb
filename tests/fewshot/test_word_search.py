"""Words are found where the model expects them for one label alone, whatever the tokenizer and the order of rows."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from fewshot import toys
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

from inlay.errors import ConfigError, DataError
from inlay.fewshot.base import Base
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.searches.word_search import (
    find_words,
    search_words,
    word_candidates,
    word_probabilities,
    word_scores,
)

TEMPLATE = Template("{text} It was {mask}.")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.98 + 0.01


def test_scores_are_the_papers_formulas() -> None:
    q, labels = drawn(7, 3), list("aababbb")
    for label in "ab":
        own = [x for x, name in enumerate(labels) if name == label]
        rest = [x for x, name in enumerate(labels) if name != label]
        scale = len(rest) / len(own)
        for word in range(3):
            likelihood_ratio = scale * sum(math.log(q[x, word]) - math.log(1 - q[x, word]) for x in own)
            likelihood_ratio += sum(math.log(1 - q[x, word]) - math.log(q[x, word]) for x in rest)
            entropy = scale * sum(math.log(q[x, word]) for x in own) + sum(math.log(1 - q[x, word]) for x in rest)
            mine = torch.tensor([name == label for name in labels])
            assert word_scores(q, mine, "llr")[word] * len(rest) == pytest.approx(likelihood_ratio, rel=1e-9)
            assert word_scores(q, mine, "ce")[word] * len(rest) == pytest.approx(entropy, rel=1e-9)


def test_the_likelihood_ratio_changes_its_sign_with_the_probabilities() -> None:
    q, own = drawn(9, 5), torch.arange(9) % 3 == 0
    torch.testing.assert_close(word_scores(1 - q, own), -word_scores(q, own))
    assert not torch.allclose(word_scores(1 - q, own, "ce"), -word_scores(q, own, "ce"))
    extreme = torch.tensor([[0.0], [1.0], [1.0]])
    torch.testing.assert_close(word_scores(1 - extreme, own[:3]), -word_scores(extreme, own[:3]))
    assert word_scores(extreme, own[:3]).isfinite().all()


def test_for_two_labels_what_speaks_for_one_speaks_against_the_other() -> None:
    q, own = drawn(8, 6), torch.tensor([True, False, False, True, False, False, False, True])
    torch.testing.assert_close(word_scores(q, own), -word_scores(q, ~own))


def planted(words: dict[str, list[int]], labels: list[str], candidates: int, seed: int = 0) -> torch.Tensor:
    """Probabilities that are noise, but for the words of each label, which are ten times likelier in its rows."""
    q = drawn(len(labels), candidates, seed=seed) * 0.01
    for row, label in enumerate(labels):
        q[row, words[label]] *= 10
    return q


LABELS = [*"abc" * 5, *"aab"]
PLANTS = {"a": [3, 9], "b": [1, 17], "c": [5, 30]}


@pytest.mark.parametrize("measure", ["llr", "ce"])
def test_planted_words_are_found(measure: str) -> None:
    candidates = [f"w{n}" for n in range(40)]
    q = planted(PLANTS, LABELS, 40)
    if measure == "llr":
        q[:, 0] = 0.4  # likely everywhere: no word for anyone, though "ce" would take it
    found = search_words(q, LABELS, candidates, per_label=2, measure=measure)  # type: ignore[arg-type]
    assert {label: {int(word[1:]) for word in words} for label, words in found.words.items()} == {
        label: set(words) for label, words in PLANTS.items()
    }


def test_the_order_of_rows_and_candidates_does_not_matter() -> None:
    draw = random.Random(0)
    candidates, q = [f"w{n}" for n in range(40)], planted(PLANTS, LABELS, 40)
    expected = search_words(q, LABELS, candidates, per_label=5).words
    rows, words = draw.sample(range(len(LABELS)), len(LABELS)), draw.sample(range(40), 40)
    again = search_words(
        q[rows][:, words], [LABELS[n] for n in rows], [candidates[n] for n in words], per_label=5
    ).words
    assert again == expected


def test_several_patterns_choose_together() -> None:
    candidates = [f"w{n}" for n in range(40)]
    patterns = torch.stack([planted(PLANTS, LABELS, 40, seed) for seed in range(3)])
    patterns[1, :, 3] = 0.005  # one pattern does not see a's first word, the others do
    joint = search_words(patterns, LABELS, candidates, per_label=4)
    own = torch.tensor([label == "a" for label in LABELS])
    summed = word_scores(patterns, own).sum(0)
    assert list(joint.words["a"]) == [candidates[n] for n in summed.topk(4).indices.tolist()]
    assert "w3" in joint.words["a"]
    assert search_words(patterns[:1], LABELS, candidates) == search_words(patterns[0], LABELS, candidates)


def test_a_word_of_two_labels_goes_to_the_one_that_it_fits_better() -> None:
    labels = [*"abc" * 4]
    q = torch.full((12, 4), 0.01)
    q[0::3, 0], q[1::3, 0] = 0.9, 0.5  # word 0: for a, less for b
    q[1::3, 1] = 0.4
    q[2::3, 2] = 0.4
    found = search_words(q, labels, ["zero", "one", "two", "three"], per_label=1)
    assert found.words == {"a": ("zero",), "b": ("one",), "c": ("two",)}


def test_only_words_that_are_likely_for_the_label_are_kept() -> None:
    labels = ["a", "b"] * 4
    q = torch.full((8, 3), 1e-9)
    q[0::2, 0], q[1::2, 0] = 1e-4, 1e-9  # a great ratio of next to nothing
    q[0::2, 1], q[1::2, 1] = 0.5, 0.1
    q[1::2, 2] = 0.5
    assert search_words(q, labels, ["rare", "good", "bad"], per_label=1).words["a"] == ("rare",)
    assert search_words(q, labels, ["rare", "good", "bad"], per_label=1, keep=1).words["a"] == ("good",)


def test_probabilities_are_the_softmax_over_the_whole_vocabulary(
    bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"text": text} for text in ("a good film", "bad", "", "it is the world news")]
    words = ["good", "bad", "never"]
    scorer = MaskScorer(tokenizer=tokenizer, template=TEMPLATE, verbalizer=Verbalizer({word: word for word in words}))
    found = word_probabilities(bert, scorer, rows, batch_size=3)
    for row, encoded in enumerate(scorer.encode(rows)):
        with torch.no_grad():
            logits = bert(input_ids=torch.tensor([encoded.ids])).logits[0, encoded.masks[0]]
        expected = logits.softmax(-1)[tokenizer.convert_tokens_to_ids(words)]
        torch.testing.assert_close(found[row], expected, atol=1e-6, rtol=1e-4)


def test_candidates_are_whole_word_starts_in_every_family(any_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["it was good, good goodly x  news", "(good) [MASK] <mask> </s> never-news world2", "bad bad  bad", "éa"]
    found = word_candidates(any_tokenizer, [TEMPLATE], texts)
    assert found[:3] in (["good", "bad", "news"], ["bad", "good", "news"])
    assert set(found) <= {"good", "bad", "news", "never", "world", "it", "was"}
    assert {"good", "bad", "news"} <= set(found)
    for word in found:
        assert len(Verbalizer({"x": word}).tokens(any_tokenizer, TEMPLATE)["x"][0]) == 1
    assert word_candidates(any_tokenizer, [TEMPLATE], texts, most=2) == found[:2]
    with pytest.raises(DataError, match="no word that is one token"):
        word_candidates(any_tokenizer, [TEMPLATE], ["x y 1 2 !"])
    with pytest.raises(DataError, match="the 0 unlabelled texts"):
        word_candidates(any_tokenizer, [TEMPLATE], [])


def test_candidates_are_one_token_at_every_patterns_mask() -> None:
    tokenizer = toys.byte_level()
    texts = ["all good news"]
    assert word_candidates(tokenizer, [TEMPLATE], texts) == ["good", "news"]
    with pytest.raises(DataError, match="no word"):  # in brackets no word is one token to this family
        word_candidates(tokenizer, [TEMPLATE, Template("({mask}) {text}")], texts)


def test_a_model_that_knows_its_words_gives_them_away(any_tokenizer: PreTrainedTokenizerFast) -> None:
    words = {"pos": ["great", "wonderful"], "neg": ["terrible", "awful"]}
    known = ["yes", "no", *words["pos"], *words["neg"]]
    ids = {word: Verbalizer({"x": word}).tokens(any_tokenizer, TEMPLATE)["x"][0][0] for word in known}
    cue = {"pos": ids["yes"], "neg": ids["no"]}
    logits = torch.randn(len(any_tokenizer), len(any_tokenizer), generator=torch.Generator().manual_seed(0)) * 0.3
    for label, listed in words.items():
        for word in listed:
            logits[cue[label], ids[word]] += 3
    model = toys.PlantedLM(lambda windows: logits[windows[..., 0]])  # the token before the mask decides
    template = Template("it was {text} {mask}")
    rows = [{"text": "yes"}, {"text": "no"}] * 3
    candidates = word_candidates(any_tokenizer, [template], [" ".join(["it was", *toys.WORDS])])
    scorer = MaskScorer(tokenizer=any_tokenizer, template=template, verbalizer=Verbalizer({w: w for w in candidates}))
    found = search_words(word_probabilities(model, scorer, rows), ["pos", "neg"] * 3, candidates, per_label=2)
    assert {label: set(listed) for label, listed in found.words.items()} == {
        label: set(listed) for label, listed in words.items()
    }


def test_from_a_base_to_a_verbalizer(bert_folder: Path) -> None:
    base = Base(str(bert_folder), device="cpu")
    templates = [TEMPLATE, Template("{mask}: {text}")]
    rows, labels = [{"text": "good film"}, {"text": "bad film"}, {"text": "great"}], ["pos", "neg", "pos"]
    unlabelled = [{"text": " ".join(toys.WORDS)}, {"text": None}]
    found = find_words(base, templates, rows, labels, unlabelled, per_label=3)
    assert found.labels == ("pos", "neg")
    assert [len(words) for words in found.words.values()] == [3, 3]
    assert find_words(base, templates, rows, labels, unlabelled, per_label=3, batch_size=1) == found
    MaskScorer(tokenizer=base.tokenizer, template=TEMPLATE, verbalizer=found)


def test_what_cannot_be_searched_is_an_error(bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="for 2 rows and 3 candidates"):
        search_words(drawn(2, 2), ["a", "b"], ["x", "y", "z"])
    with pytest.raises(DataError, match="only a"):
        search_words(drawn(2, 2), ["a", "a"], ["x", "y"])
    with pytest.raises(DataError, match="no word is left for the label"):
        search_words(drawn(3, 2), ["a", "b", "c"], ["x", "y"])
    with pytest.raises(ConfigError, match="the soft slots of"):
        find_words(Base("nowhere"), [Template("{text} {soft:2} {mask}")], [], [], [])
    with pytest.raises(ConfigError, match="llr and ce"):
        search_words(drawn(2, 2), ["a", "b"], ["x", "y"], measure="lr")  # type: ignore[arg-type]
    two = MaskScorer(
        tokenizer=tokenizer,
        template=Template("{text} {mask*2}"),
        verbalizer=Verbalizer({"a": "bad film", "b": "no news"}),
    )
    with pytest.raises(ConfigError, match="has 2"):
        word_probabilities(bert, two, [{"text": "a"}])
