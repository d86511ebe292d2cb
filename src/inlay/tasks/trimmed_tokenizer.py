"""A fast tokenizer with part of its vocabulary: which tokens others cannot do without, and its description made anew.

A text whose tokens were all kept is split as before:

    WordPiece   the longest match stays the longest when others go
    BPE         the merges inside a token are those of splitting that token alone; their parts are kept with it
    Unigram     the best path stays the best, if the price of an unknown character does: it is the lowest score less 10,
                so the piece with the lowest score is kept
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from inlay.errors import UnsupportedError
from inlay.tasks.loading import quiet

MODELS = ("Unigram", "BPE", "WordPiece", "WordLevel")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def describe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json says. Raises UnsupportedError for a tokenizer that has none, or is of another kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"{type(tokenizer).__name__} is no fast tokenizer: only one with a tokenizer.json can be trimmed"
        )
    found: dict[str, Any] = json.loads(backend.to_str())
    model = found["model"]
    if model.get("type") not in MODELS:
        raise UnsupportedError(
            f"a tokenizer of the kind {model.get('type')} cannot be trimmed, only {', '.join(MODELS)}"
        )
    if model["type"] == "BPE" and model.get("continuing_subword_prefix"):
        raise UnsupportedError("a BPE tokenizer with a continuing_subword_prefix cannot be trimmed")
    return found


def pieces(described: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the model's own tokens."""
    vocabulary = described["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return {str(token): int(row) for token, row in vocabulary.items()}
    return {str(token): row for row, (token, _) in enumerate(vocabulary)}


def added(described: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the tokens that are looked for in the text before it is split: special ones, and others."""
    return {str(entry["content"]): int(entry["id"]) for entry in described["added_tokens"]}


def always_kept(described: Mapping[str, Any]) -> set[int]:
    """Added tokens, those that are put around texts, the unknown token, bytes, and what a Unigram's scores go by."""
    model, known = described["model"], pieces(described)
    kept = set(added(described).values()) | (_processed(described.get("post_processor")) & set(known.values()))
    if described.get("padding") is not None:
        kept |= {int(described["padding"]["pad_id"])} & set(known.values())
    if model.get("unk_token") in known:
        kept.add(known[model["unk_token"]])
    if model["type"] == "Unigram":
        scores = [float(score) for _, score in model["vocab"]]
        kept.add(scores.index(min(scores)))
        kept |= set() if model.get("unk_id") is None else {int(model["unk_id"])}
    if model.get("byte_fallback"):
        kept |= {row for token, row in known.items() if _BYTE.fullmatch(token)}
    if splits_bytes(described):
        kept |= {known[letter] for letter in pre_tokenizers.ByteLevel.alphabet() if letter in known}
    return kept


def splits_bytes(described: Mapping[str, Any]) -> bool:
    """Whether tokens are spelt in bytes, each a letter of its own."""
    return '"ByteLevel"' in json.dumps([described.get("pre_tokenizer"), described.get("normalizer")])


def characters(described: Mapping[str, Any], ids: set[int]) -> set[int]:
    """Every token that is a single character of these, so that other words of the same letters can be spelt."""
    model, known = described["model"], pieces(described)
    before, after = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    letters = {letter for token, row in known.items() if row in ids for letter in token.removeprefix(before)}
    spelt = (form for letter in letters for form in (letter, before + letter, letter + after))
    return {known[form] for form in spelt if form in known}


def with_parts(described: Mapping[str, Any], ids: set[int]) -> set[int]:
    """The same tokens, and, in BPE, what they are merged from."""
    model = described["model"]
    if model["type"] != "BPE":
        return ids
    known = pieces(described)
    ranks = {pair: rank for rank, pair in enumerate(_merges(model))}
    suffix = model.get("end_of_word_suffix") or ""
    kept = set(ids)
    for token in (token for token, row in known.items() if row in ids):
        kept |= {known[part] for part in _parts(token, ranks, suffix) if part in known}
    return kept


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _parts(token: str, ranks: Mapping[tuple[str, str], int], suffix: str) -> set[str]:
    """Everything that comes up while a token is merged from its characters."""
    symbols = list(token.removesuffix(suffix) if suffix else token)
    if suffix and symbols and token.endswith(suffix):
        symbols[-1] += suffix
    seen = set(symbols)
    while len(symbols) > 1:
        pairs = [(ranks.get((a, b)), at) for at, (a, b) in enumerate(itertools.pairwise(symbols))]
        possible = [(rank, at) for rank, at in pairs if rank is not None]
        if not possible:
            break
        _, at = min(possible)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        seen.add(symbols[at])
    return seen


def trimmed(described: dict[str, Any], rows: Mapping[int, int]) -> dict[str, Any]:
    """The description with the tokens in `rows` alone, {old id: new id}; both in the same order."""
    model = dict(described["model"])
    old = pieces(described)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {
            token: rows[row] for token, row in sorted(old.items(), key=lambda item: item[1]) if row in rows
        }
    else:
        model["vocab"] = [entry for row, entry in enumerate(model["vocab"]) if row in rows]
    if model.get("unk_id") is not None:
        model["unk_id"] = rows[model["unk_id"]]
    if "merges" in model:
        kept = model["vocab"]
        merges = (pair for pair in _merges(model) if pair[0] in kept and pair[1] in kept and "".join(pair) in kept)
        model["merges"] = [list(pair) for pair in merges]
    entries = [{**entry, "id": rows[entry["id"]]} for entry in described["added_tokens"]]
    padding = described.get("padding")
    return {
        **described,
        "model": model,
        "added_tokens": entries,
        "post_processor": _reprocessed(described.get("post_processor"), rows),
        "padding": None if padding is None else {**padding, "pad_id": rows.get(padding["pad_id"], padding["pad_id"])},
    }


def _reprocessed(processor: Any, rows: Mapping[int, int]) -> Any:
    """A post-processor with new ids: they stand in templates, and beside "sep" and "cls"."""
    if not isinstance(processor, dict):
        return processor
    made = dict(processor)
    if "processors" in made:
        made["processors"] = [_reprocessed(entry, rows) for entry in made["processors"]]
    if "special_tokens" in made:
        made["special_tokens"] = {
            name: {**entry, "ids": [rows[row] for row in entry["ids"]]}
            for name, entry in made["special_tokens"].items()
        }
    for name in ("sep", "cls"):
        if name in made:
            token, row = made[name]
            made[name] = [token, rows[row]]
    return made


def _processed(processor: Any) -> set[int]:
    """The ids that `_reprocessed` moves."""
    if not isinstance(processor, dict):
        return set()
    inside = [row for entry in processor.get("processors", ()) for row in _processed(entry)]
    templates = [row for entry in processor.get("special_tokens", {}).values() for row in entry["ids"]]
    return {*inside, *templates, *(processor[name][1] for name in ("sep", "cls") if name in processor)}


def rebuilt(tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """A tokenizer of the same class and settings with this description, through the files that it would be saved in."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
        made: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder, local_files_only=True)
    made.name_or_path = tokenizer.name_or_path
    return made
