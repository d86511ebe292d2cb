"""Few-shot splits: as many rows as were asked for, the same again from the same seed, nothing on both sides."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from inlay.errors import ConfigError, DataError
from inlay.fewshot.splits import few_shot_split

LABELS = random.Random(0).choices("abc", weights=[6, 3, 1], k=300)


def test_so_many_of_each_class_and_as_many_to_develop_on() -> None:
    split = few_shot_split(LABELS, 5, dev="same", seed=1)
    assert Counter(LABELS[i] for i in split.train) == Counter(LABELS[i] for i in split.dev) == dict.fromkeys("abc", 5)


def test_so_many_in_all() -> None:
    split = few_shot_split(LABELS, 10, per="total", dev=7, seed=1)
    assert (len(split.train), len(split.dev)) == (10, 7)


@pytest.mark.parametrize("per", ["class", "total"])
def test_each_row_is_in_one_part(per: str) -> None:
    split = few_shot_split(LABELS, 4, per=per, dev=3, seed=2)  # type: ignore[arg-type]
    assert sorted([*split.train, *split.dev, *split.rest]) == list(range(300))


def test_seeds_and_digests() -> None:
    first, again, other = (few_shot_split(LABELS, 4, dev=2, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert first.to_dict()["train"] == list(first.train)


def test_more_shots_hold_the_fewer_ones() -> None:
    few, many = (few_shot_split(LABELS, k, per="total", seed=1) for k in (8, 16))
    assert many.train[:8] == few.train


def test_groups_are_on_one_side() -> None:
    groups = [index // 6 for index in range(300)]
    for seed in range(5):
        split = few_shot_split(LABELS, 4, dev=4, seed=seed, groups=groups)
        assert not {groups[i] for i in split.train} & {groups[i] for i in split.dev}


def test_what_is_left_has_no_group_of_the_rows_to_choose_by() -> None:
    groups = [index // 6 for index in range(300)]
    split = few_shot_split(LABELS, 4, dev=4, seed=1, groups=groups)
    assert split.rest
    assert not {groups[i] for i in split.dev} & {groups[i] for i in split.rest}
    assert {i for i in range(300) if groups[i] in {groups[j] for j in split.dev}}.isdisjoint(split.rest)


def test_groups_apart_are_in_no_part() -> None:
    groups = [index // 6 for index in range(300)]
    split = few_shot_split(LABELS, 4, dev=2, seed=1, groups=groups, apart={0, 7, 49})
    assert not {groups[i] for i in (*split.train, *split.dev, *split.rest)} & {0, 7, 49}
    with pytest.raises(DataError, match="'a' has 1 left of groups that are on no other side"):
        few_shot_split(["a", "a", "b"], 2, groups=[1, 2, 3], apart={2})
    with pytest.raises(ConfigError, match="groups="):
        few_shot_split(LABELS, 4, apart={2})


def test_too_few_rows_are_an_error_that_names_the_label() -> None:
    with pytest.raises(DataError, match="'b' has 1 left"):
        few_shot_split(["a", "a", "b"], 2)
    with pytest.raises(DataError, match="'b' has 0 left"):
        few_shot_split(["a", "a", "b"], 1, dev="same")
    with pytest.raises(DataError, match="there are 3"):
        few_shot_split(["a", "a", "b"], 4, per="total")


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": True}, {"k": 1.5}, {"per": "each"}, {"dev": -1}, {"dev": "all"}])
def test_numbers_that_cannot_be_meant(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        few_shot_split(LABELS, **{"k": 2, **wrong})  # type: ignore[arg-type]
