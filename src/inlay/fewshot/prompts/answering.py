"""Templates for models that go on with a text: where the answer stands, what comes before it, and its tokens.

    "{text} It was {mask}."     is asked as "{text} It was", and answered with " terrible"

The answer stands at the mask; where a template has none, behind its end. What follows the mask is not seen by a query
(nothing that comes later can be), only by the demonstrations, which are whole and stand before the query unless the
template has a place for them. An encoder and decoder reads the same prompt: a sentinel in place of the mask would suit
T5 as it was pretrained, whose answers then begin with that sentinel and end with the next one, but none of the models
that are asked in words (T0, FLAN-T5, BART, and all of T-Few), which answer a plain prompt with words and an
end-of-text token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from inlay.errors import ConfigError
from inlay.fewshot.prompts.template import Piece, Rendered, Row, Template
from inlay.fewshot.scorers.scorer import Demonstration


@dataclasses.dataclass(frozen=True)
class Answering:
    """A template split at its answer. Raises ConfigError for one that a model which reads forwards cannot be asked."""

    template: Template
    """As given."""
    reversed: bool = False
    """Whether the answer is given and the example is what follows: p(x | y)."""
    between: str = "\n"
    """What parts the demonstrations."""
    whole: Template = dataclasses.field(init=False, repr=False, compare=False)
    """With {mask} and {demos} where the template has none."""

    def __post_init__(self) -> None:
        source, kinds = self.template.source, [part.kind for part in self.template.parts]
        if kinds.count("mask") > 1:
            raise ConfigError(
                f"the template {source!r} has several masks, and a model that reads forwards answers once: keep one"
            )
        if "mask" not in kinds:
            source += "{mask}" if source[-1].isspace() else " {mask}"
        object.__setattr__(self, "whole", Template(source if "demos" in kinds else "{demos}" + source))
        kinds = [part.kind for part in self.whole.parts]
        place = kinds.index("mask")
        late = [kind for kind in kinds[place + 1 :] if kind in ("field", "demos")]
        if not self.reversed and late:
            raise ConfigError(
                f"the template {self.template.source!r} has {{mask}} before "
                f"{'a column' if 'field' in late else '{demos}'}, which a model that reads forwards has not seen when "
                "it answers there: put the mask last, such as '{text} It was {mask}.'"
            )
        if self.reversed and ("field" in kinds[:place] or "field" not in kinds or "demos" in late):
            raise ConfigError(
                f"the template {self.template.source!r} asks for the answer, and direction='channel' is how likely the "
                "example is when the answer is given: put the mask before the columns, such as 'It was {mask}. {text}'"
            )

    @property
    def gap(self) -> str:
        """The spaces between prompt and answer; they belong to the answer, as in nearly all vocabularies."""
        before = self.whole.parts[[part.kind for part in self.whole.parts].index("mask") - 1]
        return before.text[len(before.text.rstrip(" ")) :] if before.kind == "text" else ""

    def prompt(self, row: Row, demonstrations: Sequence[Demonstration] = ()) -> Rendered:
        """The demonstrations (rows with their words) and the example up to its answer."""
        found = self.whole.render(row, demonstrations=demonstrations, between=self.between)
        own = found.after[: _mask(found.after)]
        return dataclasses.replace(found, after=_stripped(own) if self.gap else own)

    def given(self, row: Row, words: str, demonstrations: Sequence[Demonstration] = ()) -> tuple[Rendered, Rendered]:
        """The demonstrations, the answer and the example; and the same up to where the example begins."""
        found = self.whole.render(row, demonstrations=demonstrations, between=self.between)
        place = _mask(found.after)
        parts = self.whole.parts
        behind = parts[[part.kind for part in parts].index("mask") + 1 :]
        words_behind = next(index for index, part in enumerate(behind) if part.kind == "field")
        rest = [piece for piece in found.after[place:] if piece.kind != "mask"]
        answer = [*found.after[:place], Piece("text", words), *rest[:words_behind]]
        whole = dataclasses.replace(found, after=[*answer, *rest[words_behind:]])
        return whole, dataclasses.replace(found, after=_stripped(answer))

    def example(self, row: Row) -> Rendered:
        """The example alone: what stands behind the answer in a template for p(x | y)."""
        whole, start = self.given(row, "a")
        return Rendered([], [], whole.after[len(start.after) :])

    def blank(self, row: Row) -> dict[str, Any]:
        """An example that says nothing: every column that is shown is empty."""
        return {**row, **dict.fromkeys(self.whole.columns, "")}

    def tokens(self, word: str, tokenizer: PreTrainedTokenizerBase, *, forwards: bool) -> tuple[int, ...]:
        """An answer's token ids: behind the prompt's last words (`forwards`), or as a decoder writes it, with its end.

        Raises ConfigError when the tokenizer does not know it.
        """
        if forwards:
            ids = _behind(self.whole.before_mask().removesuffix(self.gap), self.gap + word, tokenizer)
        else:
            encoded: Any = tokenizer(text_target=word)
            ids = list(encoded["input_ids"])
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(int(tokenizer.eos_token_id))
        if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
            raise ConfigError(f"this tokenizer does not know the answer {word!r}: choose another")
        return tuple(ids)


def _mask(pieces: Sequence[Piece]) -> int:
    return next(index for index, piece in enumerate(pieces) if piece.kind == "mask")


def _stripped(pieces: list[Piece]) -> list[Piece]:
    """Without the spaces at the end of the last text: they begin what comes next."""
    if not pieces or pieces[-1].kind != "text":
        return pieces
    last = dataclasses.replace(pieces[-1], text=pieces[-1].text.rstrip(" "))
    return [*pieces[:-1], last]


def _behind(stem: str, words: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of words behind a stem, cut as they are cut there."""
    both: Any = tokenizer(stem + words, add_special_tokens=False, return_offsets_mapping=True)
    alone: list[int] = list(tokenizer(stem, add_special_tokens=False)["input_ids"]) if stem else []
    ids = list(both["input_ids"])
    if ids[: len(alone)] == alone:
        return ids[len(alone) :]
    ends = [end for _, end in both["offset_mapping"]]  # a token lies across the border: it counts to the words
    return [token for token, end in zip(ids, ends, strict=True) if end > len(stem)]


def trailing(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the tokenizer sets behind a text; a prompt that is to be gone on with has none of them."""
    bare: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full: list[int] = list(tokenizer("a")["input_ids"])
    start = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
    return len(full) - start - len(bare)
