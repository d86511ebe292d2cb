"""From rendered examples to token ids, in the length that the model takes; template text and masks are never cut.

The whole example is one string when it is cut into tokens, so that words are cut as the tokenizer cuts them there;
which piece a token belongs to is told from where it stands in the string. What must go, goes in this order: whole
demonstrations from the last to the first, then single tokens from the end of the longest column that may be cut. Where
demonstrations are kept short so that they have their room, the example first keeps to half of the length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from inlay.errors import ConfigError
from inlay.fewshot.prompts.template import Piece, Rendered, Template
from inlay.fewshot.prompts.verbalizer import word_tokens
from inlay.tasks.batches import length_limit


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One example as token ids."""

    ids: list[int]
    masks: tuple[int, ...] = ()
    """Where the masks stand."""
    slots: tuple[tuple[int, int], ...] = ()
    """(place, number) of each soft vector."""
    demonstrations: int = 0
    """How many demonstrations are in it."""
    cut: int = 0
    """How many tokens its own columns have lost."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class _Span:
    """Where a piece stands in the text of an example."""

    start: int
    end: int
    piece: Piece
    demonstration: int | None
    slot: int = 0


class Encoder:
    """Encodes the examples of one template, at most `max_length` tokens each, the tokenizer's own included.

    `demonstration_tokens` are kept of a demonstration's column at most (None: all); of an example that is too long with
    its demonstrations so many tokens go first that it takes half of `max_length`, then demonstrations. Raises
    ConfigError where tokenizer and template do not fit, and for an example that is too long when all is cut that may be
    cut.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        demonstration_tokens: int | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} does not tell where its tokens stand in the text: templates need a fast "
                "tokenizer (a tokenizer.json)"
            )
        self.template, self.tokenizer = template, tokenizer
        self.max_length = length_limit(tokenizer, max_length)
        self.demonstration_tokens = demonstration_tokens
        self.soft_words: list[list[int | None]] = [
            [None] * part.count if part.count is not None else list(word_tokens(part.text, tokenizer))
            for part in template.soft
        ]
        """For each soft slot the tokens that its vectors start as; None: a random start."""

    def __call__(self, examples: Sequence[Rendered]) -> list[Encoded]:
        """The examples as token ids."""
        if not examples:
            return []
        spans = [list(self._spans(example)) for example in examples]
        texts = ["".join(self._spelled(span.piece) for span in row) for row in spans]
        read: Any = self.tokenizer(
            texts, return_offsets_mapping=True, return_special_tokens_mask=True, return_attention_mask=False,
            verbose=False,
        )  # fmt: skip
        return [
            self._fitted(ids, _owners(offsets, added, row), len(example.demonstrations))
            for ids, offsets, added, row, example in zip(
                read["input_ids"], read["offset_mapping"], read["special_tokens_mask"], spans, examples, strict=True
            )
        ]

    def _spans(self, example: Rendered) -> Iterator[_Span]:
        end = 0
        groups: list[tuple[int | None, list[Piece]]] = [
            (None, example.before), *enumerate(example.demonstrations), (None, example.after)
        ]  # fmt: skip
        for demonstration, pieces in groups:
            for piece in pieces:
                slots = range(1)
                if piece.kind == "soft":
                    first = sum(len(words) for words in self.soft_words[: piece.number])
                    slots = range(first, first + len(self.soft_words[piece.number]))
                for slot in slots:
                    start, end = end, end + len(self._spelled(piece))
                    yield _Span(start, end, piece, demonstration, slot)

    def _spelled(self, piece: Piece) -> str:
        """A piece as the tokenizer reads it: a soft vector holds the place of some special token."""
        if piece.kind == "text":
            return piece.text
        known = self.tokenizer
        options = {"mask": (known.mask_token,), "sep": (known.sep_token, known.eos_token)}.get(
            piece.kind, (known.mask_token, known.unk_token, known.eos_token, known.pad_token)
        )
        token = next((token for token in options if token is not None), None)
        if token is None:
            raise ConfigError(
                f"the template {self.template.source!r} needs a {piece.kind} token: this tokenizer has none"
            )
        return str(token)

    def _fitted(self, ids: list[int], owners: list[_Span | None], demonstrations: int) -> Encoded:
        """The ids within the limit, with the places of masks and soft slots in them."""
        tokens = list(zip(ids, owners, strict=True))
        own = _own(tokens)
        if self.demonstration_tokens is not None and demonstrations:
            tokens = _shortened(tokens, self.demonstration_tokens)
            tokens = _cut(tokens, min(len(tokens) - self.max_length, own - self.max_length // 2))
        while len(tokens) > self.max_length and demonstrations:
            demonstrations -= 1
            tokens = [entry for entry in tokens if entry[1] is None or entry[1].demonstration != demonstrations]
        tokens = _cut(tokens, len(tokens) - self.max_length)
        if len(tokens) > self.max_length:
            raise ConfigError(
                f"the template {self.template.source!r} and what may not be cut take {len(tokens)} tokens, and the "
                f"model is given {self.max_length}: raise max_length, shorten the template, or let more columns be cut"
            )
        masks = tuple(place for place, (_, span) in enumerate(tokens) if span is not None and span.piece.kind == "mask")
        slots = tuple(
            (place, span.slot)
            for place, (_, span) in enumerate(tokens)
            if span is not None and span.piece.kind == "soft"
        )
        return Encoded([token for token, _ in tokens], masks, slots, demonstrations, own - _own(tokens))


def _own(tokens: list[tuple[int, _Span | None]]) -> int:
    """How many tokens are not the demonstrations'."""
    return sum(span is None or span.demonstration is None for _, span in tokens)


def _cut(tokens: list[tuple[int, _Span | None]], surplus: int) -> list[tuple[int, _Span | None]]:
    """Without the ends of the example's own longest columns, at most `surplus` tokens. Ties: the later."""
    columns: dict[int, list[int]] = {}
    for place, (_, span) in enumerate(tokens):
        if span is not None and span.piece.cut and span.demonstration is None:
            columns.setdefault(span.start, []).append(place)
    gone: set[int] = set()
    for _ in range(min(surplus, sum(map(len, columns.values())))):
        longest = max(columns, key=lambda start: (len(columns[start]), start))
        gone.add(columns[longest].pop())
    return [entry for place, entry in enumerate(tokens) if place not in gone]


def _shortened(tokens: list[tuple[int, _Span | None]], limit: int) -> list[tuple[int, _Span | None]]:
    """At most `limit` tokens of each demonstration's column."""
    kept: list[tuple[int, _Span | None]] = []
    counts: dict[int, int] = {}
    for token, span in tokens:
        if span is not None and span.demonstration is not None and span.piece.cut:
            counts[span.start] = counts.get(span.start, 0) + 1
            if counts[span.start] > limit:
                continue
        kept.append((token, span))
    return kept


def _owners(offsets: Sequence[tuple[int, int]], added: Sequence[int], spans: Sequence[_Span]) -> list[_Span | None]:
    """For each token the piece that it belongs to; None for those that the tokenizer added.

    Of the pieces in a token a mask, separator or soft slot has it (some take the spaces before them along), else one
    that may not be cut, else one outside the demonstrations, else the one with the most of it.
    """
    owners: list[_Span | None] = []
    first = 0
    for (begin, stop), own in zip(offsets, added, strict=True):
        if own or not spans:
            owners.append(None)
            continue
        # Tokenizers that leave spaces out of their offsets give a token that is only a space an empty place behind it.
        start, end = (begin, stop) if stop > begin else (max(begin - 1, 0), max(begin, 1))
        while first + 1 < len(spans) and spans[first].end <= start:
            first += 1
        within = [spans[first]]
        while spans[first + len(within) - 1].end < end and first + len(within) < len(spans):
            within.append(spans[first + len(within)])
        owners.append(within[0] if len(within) == 1 else max(within, key=lambda span: _claim(span, start, end)))
    return owners


def _claim(span: _Span, start: int, end: int) -> tuple[bool, bool, bool, int]:
    """How strong a piece's claim is to the token of these characters; spaces alone make none."""
    begin, stop = max(start, span.start), min(end, span.end)
    if span.piece.kind != "text":
        return True, True, True, stop - begin
    seen = bool(span.piece.text[begin - span.start : stop - span.start].strip())
    return False, seen and not span.piece.cut, seen and span.demonstration is None, stop - begin
