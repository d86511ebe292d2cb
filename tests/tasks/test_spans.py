"""Span F1 against seqeval, and the repair of BIO tags."""

from __future__ import annotations

import random
import warnings

import pytest

from inlay.tasks.spans import close_labels, is_span_scheme, span_scores, spans, to_bio

seqeval = pytest.importorskip("seqeval.metrics")


def random_tags(draw: random.Random, length: int) -> list[str]:
    tags = ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-creative-work", "I-creative-work"]
    return draw.choices(tags, k=length)


@pytest.mark.parametrize("seed", range(20))
def test_scores_equal_seqevals_on_random_tags(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 12) for _ in range(30)]
    true = [random_tags(draw, length) for length in lengths]
    predicted = [tags if draw.random() < 0.3 else random_tags(draw, len(tags)) for tags in true]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval warns about its own numpy calls
        expected = {
            "precision": seqeval.precision_score(true, predicted),
            "recall": seqeval.recall_score(true, predicted),
            "f1": seqeval.f1_score(true, predicted),
        }
    assert span_scores(predicted, true) == pytest.approx(expected, abs=1e-12)  # the same integers divided


def test_nothing_to_find_is_zero_not_an_error() -> None:
    assert span_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("tags", "repaired"),
    [
        (["I-PER", "I-PER", "O"], ["B-PER", "I-PER", "O"]),
        (["B-PER", "I-LOC", "I-LOC"], ["B-PER", "B-LOC", "I-LOC"]),
        (["O", "I-LOC", "B-LOC"], ["O", "B-LOC", "B-LOC"]),  # IOB1
        (["B-X", "E-X", "S-Y", "O"], ["B-X", "I-X", "B-Y", "O"]),  # IOBES
        (["B-X", "I-X", "L-X", "U-Y"], ["B-X", "I-X", "I-X", "B-Y"]),  # BILOU
        (["B-creative-work", "I-creative-work"], ["B-creative-work", "I-creative-work"]),
    ],
)
def test_repair(tags: list[str], repaired: list[str]) -> None:
    assert to_bio(tags) == repaired
    assert to_bio(repaired) == repaired
    assert spans(tags) == spans(repaired)


def test_spans_are_words_from_to() -> None:
    assert spans(["B-A", "I-A", "B-A", "O", "B-B"]) == {("A", 0, 2), ("A", 2, 3), ("B", 4, 5)}


def test_schemes_are_told_apart() -> None:
    assert is_span_scheme(["O", "B-A"])
    assert not is_span_scheme(["O"])
    assert not is_span_scheme(["NOUN", "O", "B-A"])
    assert not is_span_scheme([])
    assert close_labels(["I-b", "O", "B-a"]) == ("O", "B-a", "I-a", "B-b", "I-b")
