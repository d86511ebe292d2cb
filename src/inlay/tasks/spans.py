"""Entity spans in BIO tags, and their F1: a predicted span counts when its type and both its ends are right.

Checked against seqeval (default mode, micro average) on random tag sequences. Tags of other schemes are brought to BIO
first: IOB1 and stray I- by the repair, IOBES and BILOU by their letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Span = tuple[str, int, int]
"""(type, first word, word after the last)."""

OUTSIDE = "O"
_PREFIXED = re.compile(r"[BIESLU]-.+", re.DOTALL)
_TO_BIO = {"E": "I", "L": "I", "S": "B", "U": "B"}


def is_span_scheme(tags: Iterable[str]) -> bool:
    """Whether tags mark spans (O, B-…, I-…), rather than being one class a word, such as parts of speech."""
    found = set(tags)
    return found != {OUTSIDE} and bool(found) and all(tag == OUTSIDE or _PREFIXED.fullmatch(tag) for tag in found)


def to_bio(tags: Sequence[str]) -> list[str]:
    """Tags as strict BIO: an I- that continues no entity of its type begins one, and becomes B-."""
    repaired: list[str] = []
    kind = ""  # the type of the entity that the word before belongs to
    for tag in tags:
        if tag == OUTSIDE:
            kind = ""
            repaired.append(tag)
            continue
        letter, _, name = tag.partition("-")
        letter = _TO_BIO.get(letter, letter)
        repaired.append(f"{'I' if letter == 'I' and name == kind else 'B'}-{name}")
        kind = name
    return repaired


def spans(tags: Sequence[str]) -> set[Span]:
    """The entities of one sentence."""
    found: set[Span] = set()
    kind, start = "", 0
    for index, tag in enumerate([*to_bio(tags), OUTSIDE]):
        if not tag.startswith("I-"):
            if kind:
                found.add((kind, start, index))
            kind, start = tag[2:] if tag != OUTSIDE else "", index
    return found


def span_scores(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """precision, recall and f1 over all sentences (micro average); 0 where there is nothing to divide by."""
    hits = found = wanted = 0
    for mine, theirs in zip(predicted, true, strict=True):
        ours, gold = spans(mine), spans(theirs)
        hits, found, wanted = hits + len(ours & gold), found + len(ours), wanted + len(gold)
    precision, recall = hits / found if found else 0.0, hits / wanted if wanted else 0.0
    return {"precision": precision, "recall": recall, "f1": 2 * hits / (found + wanted) if found + wanted else 0.0}


def close_labels(tags: Iterable[str]) -> tuple[str, ...]:
    """The full BIO tag set of the entity types that occur: O, then B- and I- of each type by name."""
    kinds = sorted({tag.partition("-")[2] for tag in tags if tag != OUTSIDE})
    return (OUTSIDE, *(f"{letter}-{kind}" for kind in kinds for letter in "BI"))
