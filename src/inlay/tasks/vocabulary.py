"""`trim_vocabulary`: a model and its tokenizer without the tokens that its languages never use.

    small = inlay.trim_vocabulary(model, tokenizer, texts)
    small.model.save_pretrained("small"), small.tokenizer.save_pretrained("small")

Abdaoui et al. 2020, "Load What You Need: Smaller Versions of Multilingual BERT", arXiv:2010.05609. More than half of a
multilingual model is its table of tokens, and a few languages use a few per cent of it. Tokens that stay keep their
vectors, and text made of them its hidden states: this is selection, not approximation. Other text is spelt with
shorter tokens, down to characters or bytes.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import islice
from typing import Any

from tokenizers import decoders
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.engine.adapters import find_adapters
from inlay.errors import AdapterError, ConfigError, DataError, UnsupportedError, did_you_mean
from inlay.tasks import trimmed_model as table
from inlay.tasks import trimmed_tokenizer as spelling

BATCH = 1000
"""Texts tokenised at a time."""
PROBES = 200
"""Texts whose tokens are compared afterwards."""


@dataclasses.dataclass(frozen=True)
class Trimmed:
    """A trimmed model with its tokenizer, and what became of the old one."""

    model: Any
    tokenizer: Any
    kept: tuple[int, ...]
    """The old ids in the order of the new ones: new id n was kept[n]."""
    tokens_before: int
    """Rows of the old table."""
    bytes_before: int
    """Of all of the model's weights."""
    bytes_after: int
    share: float | None
    """Of the texts' tokens, how many were kept; None without texts."""

    def renumber(self, ids: Iterable[int]) -> list[int]:
        """Old ids as new ones. Raises DataError for a token that was not kept."""
        rows = {old: new for new, old in enumerate(self.kept)}
        given = list(ids)
        for row in given:
            if row not in rows:
                raise DataError(f"token {row} was not kept: tokenise the text again")
        return [rows[row] for row in given]

    def __str__(self) -> str:
        saved = self.bytes_before - self.bytes_after
        covered = "" if self.share is None else f"; {self.share:.2%} of the texts' tokens are among them"
        return (
            f"{len(self.kept):,} of {self.tokens_before:,} tokens kept{covered}\n"
            f"{self.bytes_before / 1e6:,.1f} MB of weights are now {self.bytes_after / 1e6:,.1f} MB: "
            f"{saved / max(self.bytes_before, 1):.0%} less"
        )


def trim_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str] | None = None,
    *,
    min_count: int = 1,
    scripts: Sequence[str] | None = None,
    keep: Iterable[str] = (),
) -> Trimmed:
    """Keep the tokens that occur `min_count` times in `texts`, those written in `scripts` ("Latin", "Ethiopic"), and
    those named in `keep`; always special and added tokens, bytes, every character of the texts, and what kept tokens
    are merged from. The model is changed in place, with its decoder, biases and configs; the tokenizer is a new one.

    Raises ConfigError and DataError for what cannot be used, UnsupportedError for a tokenizer or model of another kind,
    AdapterError while an adapter is loaded; the model is then as it was.
    """
    if texts is None and not scripts:
        raise ConfigError("trim_vocabulary needs texts, or scripts such as ['Latin']: something says what is to stay")
    adapters = find_adapters(model)
    if adapters is not None and adapters.loaded:
        raise AdapterError("trim_vocabulary changes the base, and an adapter sits in it: detach it first")
    described = spelling.describe(tokenizer)
    known = {**spelling.pieces(described), **spelling.added(described)}
    before = table.table_of(model).num_embeddings
    if known and max(known.values()) >= before:
        raise ConfigError(f"the tokenizer has ids up to {max(known.values())}, and the model rows up to {before - 1}")
    named = table.ids_in(table.configs_of(model), before)
    table.check_ids(named, set(known.values()))
    probes, counts = _counted(tokenizer, texts, min_count)
    kept = {row for row, count in counts.items() if count >= min_count}
    kept |= _in_scripts(described, scripts or ()) | _named(known, keep)
    kept |= spelling.always_kept(described).union(*named.values())
    kept = spelling.with_parts(described, kept | spelling.characters(described, kept | set(counts)))
    first = table.counted_from(model)
    order = tuple(sorted(kept | {row for row in known.values() if first is not None and row <= first}))
    rows = {old: new for new, old in enumerate(order)}
    small = spelling.rebuilt(tokenizer, spelling.trimmed(described, rows))
    _check(tokenizer, small, known, rows, probes)
    size = _bytes(model)
    table.keep_rows(model, rows)
    total = sum(counts.values())
    share = sum(count for row, count in counts.items() if row in rows) / total if total else None
    return Trimmed(model, small, order, before, size, _bytes(model), share)


def _counted(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str] | None, min_count: int
) -> tuple[list[str], Counter[int]]:
    """The first texts, and how often each token occurs in all of them."""
    if isinstance(texts, str):
        raise DataError("texts is one string: give a list of texts")
    if not isinstance(min_count, int) or min_count < 1:
        raise ConfigError(f"min_count={min_count!r}: a whole number of at least 1 is needed")
    probes: list[str] = []
    counts: Counter[int] = Counter()
    given = iter(texts or ())
    while batch := list(islice(given, BATCH)):
        wrong = next((text for text in batch if not isinstance(text, str)), None)
        if wrong is not None:
            raise DataError(f"texts holds a {type(wrong).__name__}, {wrong!r:.40}: only strings can be tokenised")
        probes += batch[: max(PROBES - len(probes), 0)]
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            counts.update(ids)
    if texts is not None and not counts:
        raise DataError("texts holds no text: nothing would be kept but special tokens")
    return probes, counts


def _named(known: dict[str, int], keep: Iterable[str]) -> set[int]:
    tokens = list(keep)
    for token in tokens:
        if token not in known:
            raise ConfigError(f"keep names {token!r}, which is no token of this tokenizer{did_you_mean(token, known)}")
    return {known[token] for token in tokens}


# -- scripts -----------------------------------------------------------------------------------------------------------


@cache
def script(character: str) -> str | None:
    """The script of a letter or its mark, by the first word of its name in Unicode; None for what all scripts share."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    first = unicodedata.name(character, "").partition(" ")[0]
    return None if first in ("", "COMBINING", "MODIFIER", "VARIATION", "FEMININE", "MASCULINE", "MICRO") else first


def _in_scripts(described: dict[str, Any], scripts: Sequence[str]) -> set[int]:
    """Tokens all of whose letters are of these scripts; digits, signs and spaces belong to every script."""
    if not scripts:
        return set()
    if isinstance(scripts, str):
        raise ConfigError(f"scripts={scripts!r} is one string: give a list, [{scripts!r}]")
    wanted = {name.upper() for name in scripts}
    there = {found for code in range(0x20000) if (found := script(chr(code))) is not None}
    for name in sorted(wanted - there):
        names = [found.capitalize() for found in there]
        raise ConfigError(f"scripts names {name.capitalize()!r}, which is no script{did_you_mean(name, names)}")
    bytes_ = spelling.splits_bytes(described)
    decoder = decoders.ByteLevel()
    kept = set()
    for token, row in spelling.pieces(described).items():
        text = decoder.decode([token]) if bytes_ else token
        if "\ufffd" not in text and {script(letter) for letter in text} <= {None, *wanted}:
            kept.add(row)
    return kept


# -- afterwards --------------------------------------------------------------------------------------------------------


def _check(
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    known: dict[str, int],
    rows: dict[int, int],
    probes: Sequence[str],
) -> None:
    """Raise UnsupportedError unless every kept token has its new id, and texts of kept tokens are split as before."""
    moved = {token: rows[row] for token, row in known.items() if row in rows}
    now = new.get_vocab()
    wrong = next((token for token, row in moved.items() if now.get(token) != row), None)
    if wrong is not None or len(now) != len(moved):
        raise UnsupportedError(
            f"{type(old).__name__} does not come back from its files with the tokens it was given "
            f"({wrong!r} is {now.get(str(wrong))}, not {moved.get(str(wrong))}): it cannot be trimmed"
        )
    if probes:
        split = [tokenizer(list(probes), verbose=False)["input_ids"] for tokenizer in (old, new)]
        for text, before, after in zip(probes, *split, strict=True):
            if all(row in rows for row in before) and [rows[row] for row in before] != after:
                raise UnsupportedError(f"trimmed, {type(old).__name__} would split {text[:60]!r} in another way")


def _bytes(model: PreTrainedModel) -> int:
    """Of all parameters and buffers, shared ones counted once."""
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(held.values())
