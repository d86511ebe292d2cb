"""Several languages in one training set: their shares, that no row is lost, and that the draw is always the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from inlay.errors import ConfigError, DataError
from inlay.tasks.data import place
from inlay.tasks.mixture import epoch, mix, shares

SIZES = {"hausa": 900, "swahili": 90, "yoruba": 9}


@pytest.mark.parametrize("temperature", [0.5, 1, 2, 3.3, 1000])
def test_shares_are_powers_of_the_sizes(temperature: float) -> None:
    total = sum(size ** (1 / temperature) for size in SIZES.values())
    assert shares(SIZES, temperature) == pytest.approx({n: s ** (1 / temperature) / total for n, s in SIZES.items()})
    counts = epoch(SIZES, temperature)
    rows = sum(counts.values())
    for name, share in shares(SIZES, temperature).items():
        assert abs(counts[name] - share * rows) <= 1.5  # whole rows
        assert counts[name] >= SIZES[name]
    once = [name for name in SIZES if counts[name] == SIZES[name]]
    assert once  # nobody is repeated without need


def tables() -> dict[str, Dataset]:
    return {name: Dataset.from_dict({"text": [f"{name} {n}" for n in range(size)]}) for name, size in SIZES.items()}


def test_every_row_is_there_as_often_as_any_other_or_once_more() -> None:
    mixed = mix(tables(), temperature=3)
    counts = epoch(SIZES, 3)
    assert counts["hausa"] == 900
    for name, size in SIZES.items():
        times = Counter(text for text in mixed["text"] if text.startswith(name))
        assert len(times) == size
        assert sum(times.values()) == counts[name]
        assert max(times.values()) - min(times.values()) <= 1


def test_the_draw_depends_on_the_seed_and_the_source_alone() -> None:
    first, again = mix(tables(), temperature=2, seed=1), mix(tables(), temperature=2, seed=1)
    assert first["text"] == again["text"] != mix(tables(), temperature=2, seed=2)["text"]
    assert mix(tables())["text"] == [text for rows in tables().values() for text in rows["text"]]


def test_files_folders_and_columns(write: Callable[..., Path]) -> None:
    one = write("one/train.jsonl", [{"text": "a", "label": "x"}])
    write("one/validation.jsonl", [{"text": "b", "label": "x"}])
    two = write("two.jsonl", [{"text": "c", "id": 1}])
    assert mix({"one": one.parent, "two": two}).to_list() == [{"text": "a"}, {"text": "c"}]
    mixed = mix({"one": one.parent}, split="validation")
    assert mixed["text"] == ["b"]
    assert place(mix({"one": one.parent, "two": two}), 1) == "the mixture of one, two row 1"


def test_bad_input(write: Callable[..., Path]) -> None:
    words, numbers = write("w.jsonl", [{"text": "a"}]), write("n.jsonl", [{"text": 1}])
    other = write("o.jsonl", [{"satz": "a"}])
    with pytest.raises(DataError, match=r"n\.jsonl: column 'text' holds .*int64.*one mixture needs one kind"):
        mix({"a": words, "b": numbers})
    with pytest.raises(DataError, match="mixture of a, b has no column in common"):
        mix({"a": words, "b": other})
    with pytest.raises(DataError, match="mixture of nothing"):
        mix({})
    with pytest.raises(ConfigError, match="temperature=0: a number above 0"):
        mix({"a": words}, temperature=0)
