"""The checks of methods' fields: each kind of value, its edges, and the sentence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from inlay.errors import ConfigError
from inlay.pieces.checks import CheckedMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sized(CheckedMethod):
    kind = "sized_for_a_test"

    r: int = 1
    width: int | None = None
    first: int = 0
    scale: float = 1.0
    rate: float = 0.0
    share: float = 0.5
    loss_weight: float = 0.0
    init: str = "zeros"
    compat: str | None = None

    def __post_init__(self) -> None:
        self.check_whole("r", "width")
        self.check_whole("first", least=0)
        self.check_number("scale")
        self.check_rate("rate")
        self.check_positive("share")
        self.check_at_least_zero("loss_weight")
        self.check_choice("init", ("zeros", "ones"))
        self.check_choice("compat", (None, "authors"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 3, "width": 2},
        {"width": None, "compat": None},
        {"scale": -1, "rate": 0.9, "share": 7},
        {"init": "ones"},
    ],
)
def test_what_fits(fields: dict[str, Any]) -> None:
    Sized(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0): a whole number of at least 1 is needed"),
        ({"r": None}, "r=None): a whole number of at least 1 is needed"),
        ({"r": True}, "r=True): a whole number"),
        ({"width": 1.5}, "width=1.5): a whole number"),
        ({"first": -1}, "first=-1): a whole number of at least 0 is needed"),
        ({"scale": 0}, "scale=0): a number other than 0 is needed"),
        ({"scale": float("nan")}, "scale=nan): a number other than 0"),
        ({"loss_weight": -0.1}, "loss_weight=-0.1): a number of at least 0 is needed"),
        ({"loss_weight": "a"}, "loss_weight='a'): a number of at least 0"),
        ({"rate": 1.0}, "rate=1.0): a probability in [0, 1) is needed"),
        ({"rate": "half"}, "rate='half'): a probability"),
        ({"share": 0}, "share=0): a positive number is needed"),
        ({"share": float("inf")}, "share=inf): a positive number"),
        ({"init": "zeroes"}, "init='zeroes'): choose one of zeros, ones; did you mean 'zeros'"),
        ({"init": None}, "init=None): choose one of zeros, ones"),
        ({"compat": "paper"}, "compat='paper'): choose one of None, authors"),
    ],
)
def test_what_does_not(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        Sized(**fields)
    assert f"Sized({message}" in str(found.value)
