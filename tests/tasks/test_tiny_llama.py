"""The example script's tokenizers against the rule they stand for, written out."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

SPACE = "\u2581"


def by_the_rule(pieces: list[dict[str, object]], text: str) -> list[int]:
    """Characters (or bytes), then again and again the leftmost join with the highest score."""
    table = {str(entry["piece"]): (index, float(str(entry["score"]))) for index, entry in enumerate(pieces)}
    tokens: list[str] = []
    for character in (SPACE + text).replace(" ", SPACE):
        if character in table:
            tokens.append(character)
        else:
            tokens += [f"<0x{byte:02X}>" for byte in character.encode()] if "<0x00>" in table else ["<unk>"]
    while True:
        joins = [(-table[a + b][1], place) for place, (a, b) in enumerate(pairwise(tokens)) if a + b in table]
        if not joins:
            return [1, *(table[token][0] for token in tokens)]
        place = min(joins)[1]
        tokens[place : place + 2] = [tokens[place] + tokens[place + 1]]


@pytest.mark.parametrize("name", ["stories260k", "babyllama105"])
def test_tokenizers_follow_the_rule_and_decode(shared_data: Path, tiny_llama: ModuleType, name: str) -> None:
    pieces = json.loads((shared_data / "weights" / name / "vocab.json").read_text(encoding="utf-8"))
    tokenizer = tiny_llama.build_tokenizer(pieces, 512)
    lines = (shared_data / "text" / "tinystories_sample.txt").read_text(encoding="utf-8").splitlines()
    for line in [*(line for line in lines[:12] if line and "<|" not in line), "naïve 東京", "a  b", " c"]:
        ids = tokenizer(line, verbose=False).input_ids
        assert ids == by_the_rule(pieces, line)
        if name == "stories260k":
            assert tokenizer.decode(ids, skip_special_tokens=True) == line
