"""Settings of the wrong type are one error that names the field, for every method and every few-shot system."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

import inlay.fewshot.systems
from inlay.engine.field_types import check_fields, check_type
from inlay.engine.registry import all_methods, make_method
from inlay.errors import ConfigError
from inlay.fewshot.problem import System
from inlay.fewshot.systems import system_class

METHODS = all_methods()
SYSTEMS = [system_class(kind) for kind in inlay.fewshot.systems.kinds()]


def numbers_and_truths(cls: type) -> list[str]:
    """The fields that no text fits, by their annotation."""
    return [field.name for field in dataclasses.fields(cls) if set(str(field.type).split(" | ")) <= PLAIN]


PLAIN = {"int", "float", "bool", "None"}


@pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.kind)
def test_text_for_a_number_in_a_method(method: Any) -> None:
    for name in numbers_and_truths(method):
        with pytest.raises(ConfigError, match=f"method {method.kind}: {name} must be .*, got 'no'"):
            make_method(method.kind, {name: "no"})


@pytest.mark.parametrize("cls", [*METHODS, *SYSTEMS], ids=lambda cls: cls.kind)
def test_every_default_is_of_its_type(cls: type) -> None:
    defaults = {
        field.name: field.default for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING
    }
    check_fields(cls, defaults, "defaults")


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda cls: cls.kind)
def test_text_for_a_number_in_a_system(system: type[System]) -> None:
    for name in numbers_and_truths(system):
        with pytest.raises(ConfigError, match=f"{name} must be .*, got 'no'"):
            check_fields(system, {name: "no"}, system.kind)


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [1, -1], [True, 1.0, "1", None]),
        (float, [1, 1.5, float("inf")], [True, "1e-3", None, [1.0]]),
        (bool, [True, False], [0, "no", None]),
        (str, ["", "no"], [1, None, ["no"]]),
        (float | None, [None, 2], ["none", False]),
        (int | float | str, [1, "1GB", 0.5], [True, None]),
        (tuple[str, ...], [("a",), ["a"], ()], ["a", 1, {"a": 1}]),
        (Sequence[int], [[1], (1,)], ["12", 1]),
        (Mapping[str, float], [{}, {"a": 1}], [[], "a", 1]),
        (float | tuple[str, str], [0.5, ["a", "b"]], ["a", True]),
        (Literal["a"] | None, ["a", "z", None], []),  # for its owner, who names the nearest
        (Any, [1, "a", None], []),
    ],
)  # fmt: skip
def test_what_fits(hint: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check_type(value, hint, "key")
    for value in bad:
        with pytest.raises(ConfigError, match="key must be "):
            check_type(value, hint, "key")


def test_the_error_says_what_is_needed() -> None:
    with pytest.raises(ConfigError, match="key must be a number or a list or null, got 'a'"):
        check_type("a", float | tuple[str, str] | None, "key")
