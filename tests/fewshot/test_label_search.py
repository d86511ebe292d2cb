"""Label words: the planted ones are found, as brute force finds them; what begins a word is told in every family."""

from __future__ import annotations

import itertools

import pytest
import torch
from fewshot import toys
from transformers import PreTrainedTokenizerFast

from inlay.errors import ConfigError, DataError
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer, word_tokens
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.searches.label_search import Near, search_labels, vocabulary_scores, word_starts

NAMES = ("a", "b", "c")
Y = ["a", "b", "c"] * 4
WORDS = {token: f"w{token}" for token in range(5, 40)}


def random_scores(seed: int = 0, vocabulary: int = 45) -> torch.Tensor:
    return torch.randn(len(Y), vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def planted(seed: int = 0) -> torch.Tensor:
    """Each class says its own word a little more than the others do, in each of its examples."""
    scores = random_scores(seed) * 0.4
    for row, label in enumerate(Y):
        scores[row, 10 + NAMES.index(label)] = 4.0
        scores[row, [10 + number for number, name in enumerate(NAMES) if name != label]] = 3.0
    return scores


def brute_force(scores: torch.Tensor, k: int) -> list[tuple[int, ...]]:
    """All combinations of the k likeliest words, one after another, in the order that the module promises."""
    log_probs = scores.double().log_softmax(-1)
    of = {name: log_probs[[row for row, label in enumerate(Y) if label == name]].mean(0) for name in NAMES}
    pools = [sorted(WORDS, key=lambda token, name=name: -float(of[name][token]))[:k] for name in NAMES]
    found = []
    for places in itertools.product(range(k), repeat=3):
        tokens = tuple(pool[at] for pool, at in zip(pools, places, strict=True))
        if len(set(tokens)) == 3:
            right = sum(
                NAMES[max(range(3), key=lambda c: float(log_probs[row, tokens[c]]))] == label
                for row, label in enumerate(Y)
            )
            mean = sum(float(of[name][token]) for name, token in zip(NAMES, tokens, strict=True))
            found.append((-right, -mean, places, tokens))
    return [entry[-1] for entry in sorted(found)]


def tokens(found: list[Verbalizer]) -> list[tuple[int, ...]]:
    return [tuple(int(words[0][1:]) for words in one.words.values()) for one in found]


@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force(seed: int) -> None:
    scores = random_scores(seed)
    expected = brute_force(scores, 7)
    assert tokens(search_labels(scores, Y, WORDS, 7, 400)) == expected
    assert tokens(search_labels(scores, Y, WORDS, 7, 5, budget=343)) == expected[:5]


def test_finds_the_planted_words() -> None:
    found = search_labels(planted(), Y, WORDS)
    assert tokens(found)[0] == (10, 11, 12)
    assert found[0].labels == NAMES
    assert len(found) == 100
    assert len(set(tokens(found))) == 100


def test_the_order_of_labels_is_as_asked_for() -> None:
    best = search_labels(planted(), Y, WORDS, 10, 1, labels=("c", "a", "b"))[0]
    assert best.words == {"c": ("w12",), "a": ("w10",), "b": ("w11",)}


def test_a_constant_of_each_example_changes_nothing() -> None:
    scores = random_scores(3)
    shift = torch.randn(len(Y), 1, generator=torch.Generator().manual_seed(9)) * 50
    assert tokens(search_labels(scores + shift, Y, WORDS, 8, 50)) == tokens(search_labels(scores, Y, WORDS, 8, 50))


def test_a_small_budget_finds_the_planted_words_too_and_never_scores_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.fewshot.searches import label_search

    scores, counts = planted(4), list[int]()
    scored = label_search._Space.ascent

    def counting(self: label_search._Space, budget: int, seed: int):  # type: ignore[no-untyped-def]
        for chunk in scored(self, budget, seed):
            counts.append(len(chunk))
            yield chunk

    monkeypatch.setattr(label_search._Space, "ascent", counting)
    found = search_labels(scores, Y, WORDS, 35, 20, budget=700)
    assert sum(counts) == 700 < 35**3
    assert tokens(found)[0] == (10, 11, 12)
    assert tokens(search_labels(scores, Y, WORDS, 35, 20, budget=700)) == tokens(found)


def test_the_ascent_starts_from_different_words_where_all_classes_like_the_same() -> None:
    scores = random_scores(5) * 0.1
    scores[:, 20:24] += torch.tensor([8.0, 7.0, 6.0, 5.0])
    best = tokens(search_labels(scores, Y, WORDS, 35, 1, budget=110))[0]
    assert len(set(best)) == 3


def test_near_keeps_neighbours_of_a_word_of_the_set() -> None:
    head = torch.zeros(45, 2)
    head[:, 0] = torch.linspace(0, 3, 45).cos()
    head[:, 1] = torch.linspace(0, 3, 45).sin()
    near = Near(head, {"a": 10, "b": 20, "c": 30}, 5)
    found = tokens(search_labels(planted(), Y, WORDS, 35, 1000, near=near))
    assert {one[0] for one in found} == {8, 9, 10, 11, 12}
    assert {one[1] for one in found} == {18, 19, 20, 21, 22}
    assert len(found) == 125
    with pytest.raises(ConfigError, match="no word for the label 'c'"):
        search_labels(planted(), Y, WORDS, 5, near=Near(head, {"a": 10, "b": 20}, 5))


def test_word_starts_are_words_that_are_one_token_at_the_mask(any_tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template("{text} It was {mask}.")
    found = word_starts(any_tokenizer, template)
    for token, word in found.items():
        assert word_tokens(word, any_tokenizer, template.before_mask()) == (token,)
        assert word.isalpha()
    assert set(toys.WORDS) <= set(found.values())
    # Beside the words stand what words begin with, where the vocabulary has it: letters, and the steps of its merges.
    longer = {word for word in found.values() if len(word) > 1}
    assert all(any(known.startswith(word) for known in toys.WORDS) for word in longer)


def test_words_in_the_middle_of_others_are_no_word_starts() -> None:
    split = toys.wordpiece([*toys.WORDS, "##ing", "##s"])
    found = word_starts(split, Template("{text} is {mask}"))
    assert "film" in found.values()
    assert not {split.convert_tokens_to_ids(one) for one in ("##ing", "##s", "##a", ".", "1", "[MASK]")} & set(found)


def test_from_a_models_logits_to_words(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that says "no" after "bad" and "yes" after "good"; a word of neither class is likelier than both."""
    ids = {word: int(tokenizer.convert_tokens_to_ids(word)) for word in ("good", "bad", "yes", "no", "world")}  # type: ignore[arg-type]

    def answer(windows: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*windows.shape[:-1], len(tokenizer))
        logits[..., ids["world"]] = 5
        for word, said in (("good", "yes"), ("bad", "no")):
            logits[..., ids[said]] = 2 + 2 * (windows[..., 0] == ids[word])
        return logits

    template = Template("{text} {mask}")
    asked = MaskScorer(tokenizer=tokenizer, template=template, verbalizer=Verbalizer({"neg": "a", "pos": "the"}))
    rows = [{"text": text} for text in ("film is good", "good", "bad", "the film was bad")]
    scores = vocabulary_scores(toys.PlantedLM(answer), asked, rows, batch_size=3)
    assert scores.shape == (4, len(tokenizer))
    found = search_labels(scores, ["pos", "pos", "neg", "neg"], word_starts(tokenizer, template), 5, 3)
    assert found[0].words == {"neg": ("no",), "pos": ("yes",)}
    two = MaskScorer(tokenizer=tokenizer, template=Template("{text} {mask*2}"), verbalizer=Verbalizer({"x": "all in"}))
    with pytest.raises(ConfigError, match="at one mask"):
        vocabulary_scores(toys.PlantedLM(answer), two, rows)


def test_what_cannot_be_searched_is_an_error() -> None:
    with pytest.raises(DataError, match="'d' has no example"):
        search_labels(random_scores(), Y, WORDS, labels=(*NAMES, "d"))
    with pytest.raises(DataError, match="a row has the label 'c'"):
        search_labels(random_scores(), Y, WORDS, labels=("a", "b"))
    with pytest.raises(ConfigError, match="3 labels need a word each, and there are 2"):
        search_labels(random_scores(), Y, {5: "five", 6: "six"})
    with pytest.raises(ConfigError, match="at least 1"):
        search_labels(random_scores(), Y, WORDS, k=0)
