"""Templates: how an example is put into words that a pretrained model has something to say about.

    "{text} It was {mask}."        a column, words, and the place where the model answers

A template is compiled once and never evaluated as code. In braces stand

    {column}               the example's cell; long ones are cut from their end; {column:keep} never is
    {column|lower_first}   the same after one or more filters: lower_first, strip_punctuation, lower, strip
    {mask}                 one mask token; {mask*2}: two; {mask*}: as many as the longest label's words need
    {soft:3}               three trained vectors (P-tuning); {soft:Question}: as many as the words have, starting there
    {sep}                  the tokenizer's separator
    {demos}                the demonstrations, where not at the end; each is this template, its masks filled in
    {{ and }}              braces themselves

Schick & Schütze 2021, arXiv:2001.07676 (patterns); Gao et al. 2021, arXiv:2012.15723 (demonstrations); Liu et al. 2021,
arXiv:2103.10385 (soft slots).
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from inlay.errors import ConfigError, DataError, did_you_mean

Row = Mapping[str, Any]
"""One example: its columns."""
Kind = Literal["text", "field", "mask", "soft", "sep", "demos"]

FILTERS: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "lower_first": lambda text: text[:1].lower() + text[1:],
    "strip": str.strip,
    "strip_punctuation": lambda text: text.rstrip().rstrip(string.punctuation).rstrip(),
}
RESERVED = ("mask", "soft", "sep", "demos")
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a compiled template."""

    kind: Kind
    text: str = ""
    """Words (text), the column's name (field), the words that start a soft slot (soft)."""
    filters: tuple[str, ...] = ()
    cut: bool = False
    """Whether it may lose its end where an example is too long."""
    count: int | None = 1
    """Masks, or soft vectors; None: as many as it takes."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of a rendered example: some text, or one mask, soft slot or separator."""

    kind: Literal["text", "mask", "soft", "sep"]
    text: str = ""
    cut: bool = False
    number: int = 0
    """Which soft slot of the template it is, counted from 0; an encoder knows how many vectors it has."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """An example in pieces: what stands before its demonstrations, these, and what stands after them."""

    before: list[Piece]
    demonstrations: list[list[Piece]]
    after: list[Piece]

    def __str__(self) -> str:
        shown = {"mask": "[mask]", "soft": "[soft]", "sep": "[sep]"}
        pieces = [*self.before, *(piece for demo in self.demonstrations for piece in demo), *self.after]
        return "".join(shown.get(piece.kind, piece.text) for piece in pieces)


@dataclasses.dataclass(frozen=True)
class Template:
    """A compiled template. Raises ConfigError for one that cannot be read, or has neither column nor mask."""

    source: str
    parts: tuple[Part, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source.strip():
            raise ConfigError(f"a template is text such as '{{text}} It was {{mask}}.', got {self.source!r}")
        object.__setattr__(self, "parts", tuple(_parts(self.source)))
        if not self.columns:
            raise ConfigError(
                f"the template {self.source!r} shows nothing of an example: put a column into it, such as {{text}}"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it shows."""
        return tuple(dict.fromkeys(part.text for part in self.parts if part.kind == "field"))

    @property
    def masks(self) -> int | None:
        """How many masks it has; None where the labels' words decide."""
        counts = [part.count for part in self.parts if part.kind == "mask"]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def soft(self) -> tuple[Part, ...]:
        """Its soft slots."""
        return tuple(part for part in self.parts if part.kind == "soft")

    def need_mask(self) -> Template:
        """Itself. Raises ConfigError when it has no mask, or several of which one is to be as wide as the words."""
        kinds = [part for part in self.parts if part.kind == "mask"]
        if not kinds:
            raise ConfigError(
                f"the template {self.source!r} has no {{mask}}: say where the model answers, "
                "such as '{text} It was {mask}.'"
            )
        if len(kinds) > 1 and self.masks is None:
            raise ConfigError(f"the template {self.source!r} has {{mask*}} beside another mask; give each its number")
        return self

    def check(self, rows: Any) -> None:
        """Raise DataError when the rows (a `datasets` object) lack a column that it shows."""
        have = list(rows.column_names)
        for column in self.columns:
            if column not in have:
                raise DataError(
                    f"the template {self.source!r} shows {{{column}}}, and the rows have no such column"
                    f"{did_you_mean(column, have)}; they have: {', '.join(have)}"
                )

    def before_mask(self) -> str:
        """The text just before the (first) mask, from the last column on, which stands as a letter."""
        text = ""
        for part in self.parts:
            if part.kind == "mask":
                return text
            text = {"field": "a", "text": text + part.text}.get(part.kind, "")
        return text

    def render(
        self,
        row: Row,
        *,
        masks: int = 1,
        fill: str | None = None,
        demonstrations: Sequence[tuple[Row, str]] = (),
        between: str = " ",
    ) -> Rendered:
        """One example as pieces. `masks` is the width of {mask*}; `fill` stands in place of all masks.

        `demonstrations` are (row, words) pairs: they go where {demos} is, else behind the example, with `between`
        parting them. Raises DataError for a row without a column that is shown.
        """
        own = self._pieces(row, masks, fill)
        places = [index for index, part in enumerate(self.parts) if part.kind == "demos"]
        border, gap = places[0] if places else len(own), [Piece("text", between)]
        shown = [_flat(self._pieces(other, masks, words)) for other, words in demonstrations]
        return Rendered(
            before=_flat(own[:border]),
            demonstrations=[[*demo, *gap] if places else [*gap, *demo] for demo in shown],
            after=_flat(own[border:]),
        )

    def _pieces(self, row: Row, masks: int, fill: str | None) -> list[list[Piece]]:
        words = None if fill is None else self._fills(fill)
        return [self._piece(part, index, row, masks, words) for index, part in enumerate(self.parts)]

    def _piece(self, part: Part, index: int, row: Row, masks: int, words: dict[int, str] | None) -> list[Piece]:
        if part.kind == "text":
            return [Piece("text", part.text)]
        if part.kind == "field":
            return [Piece("text", _cell(row, part, self.source), part.cut)]
        if part.kind == "mask":
            if words is not None:
                return [Piece("text", words[index])]
            return [Piece("mask")] * (masks if part.count is None else part.count)
        if part.kind == "soft":
            return [Piece("soft", number=sum(other.kind == "soft" for other in self.parts[:index]))]
        return [Piece("sep")] if part.kind == "sep" else []

    def _fills(self, fill: str) -> dict[int, str]:
        """What stands at each mask: a word each where there are as many words as masks, else all at the first."""
        places = [index for index, part in enumerate(self.parts) if part.kind == "mask"]
        words = fill.split() if len(fill.split()) == len(places) else [fill]
        return dict(zip(places, [*words, *[""] * (len(places) - len(words))], strict=True))


def _flat(groups: list[list[Piece]]) -> list[Piece]:
    return [piece for group in groups for piece in group if piece.kind != "text" or piece.text]


def _cell(row: Row, part: Part, source: str) -> str:
    if part.text not in row:
        raise DataError(
            f"the template {source!r} shows {{{part.text}}}, and the example has no such column"
            f"{did_you_mean(part.text, row)}; it has: {', '.join(row)}"
        )
    text = "" if row[part.text] is None else str(row[part.text])
    for name in part.filters:
        text = FILTERS[name](text)
    return text


def _parts(source: str) -> list[Part]:
    parts: list[Part] = []
    words, end = "", 0
    for match in _BRACES.finditer(source):
        words += source[end : match.start()]
        end = match.end()
        if match[0] in ("{{", "}}"):
            words += match[0][0]
            continue
        if match[1] is None or not match[1].strip():
            raise ConfigError(
                f"the template {source!r} has {match[0]!r} at position {match.start()}: braces hold a column, "
                "{mask}, {soft:3}, {sep} or {demos}; write {{ and }} for braces themselves"
            )
        if words:
            parts.append(Part("text", words))
            words = ""
        parts.append(_part(match[1].strip(), source))
    words += source[end:]
    return [*parts, Part("text", words)] if words else parts


def _part(inside: str, source: str) -> Part:
    name, *filters = (entry.strip() for entry in inside.split("|"))
    if re.fullmatch(r"mask(\*\d*)?", name):
        width = name.partition("*")[2] if "*" in name else "1"
        if width and int(width) == 0:
            raise ConfigError(f"the template {source!r} has {{{inside}}}: at least one mask is needed there")
        made = Part("mask", count=int(width) if width else None)
    elif name.startswith("soft:"):
        what = name.removeprefix("soft:").strip()
        if not what.strip("0"):
            raise ConfigError(f"the template {source!r} has {{{inside}}}: say how many, {{soft:3}}, or which words")
        made = Part("soft", count=int(what)) if what.isdecimal() else Part("soft", what, count=None)
    elif name in ("sep", "demos"):
        made = Part("sep" if name == "sep" else "demos")
    else:
        column, _, flag = name.partition(":")
        if flag not in ("", "keep", "cut") or column in RESERVED or column.startswith("mask*"):
            raise ConfigError(
                f"the template {source!r} has {{{inside}}}, which is neither {{mask}}, {{mask*2}}, {{soft:3}}, "
                "{sep}, {demos} nor a column such as {text} or {text:keep}"
            )
        made = Part("field", column.strip(), tuple(filters), cut=flag != "keep")
    if made.kind != "field" and filters:
        raise ConfigError(f"the template {source!r} has {{{inside}}}: filters are for columns")
    for entry in filters:
        if entry not in FILTERS:
            raise ConfigError(
                f"the template {source!r} has no filter {entry!r}{did_you_mean(entry, FILTERS)}; "
                f"filters: {', '.join(FILTERS)}"
            )
    return made
