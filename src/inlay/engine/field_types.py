"""Settings against the types that are declared for them: a setting `no` is text, and text is true. Imports no torch."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from inlay.errors import ConfigError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def check_fields(cls: type, fields: Mapping[str, Any], what: str) -> None:
    """`check_type` for each of these fields of a dataclass; `what` is how the error begins."""
    declared = _hints(cls)
    for name, value in fields.items():
        if name in declared:
            check_type(value, declared[name], f"{what}: {name}")


def check_type(value: Any, hint: Any, key: str) -> None:
    """Raise ConfigError for a value that is nothing of what the hint says.

    A number without a point is a number; true is none. JSON's lists serve for tuples. Not looked at: what is inside of
    containers, and choices of words (Literal), which their owner checks, naming the nearest.
    """
    if not _fits(value, hint):
        raise ConfigError(f"{key} must be {_said(hint)}, got {value!r}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    unknown: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(cls, localns=unknown)
        except NameError as missing:  # imported for type checkers alone
            unknown[str(missing.name)] = Any


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin in (int, float):
        return isinstance(value, int if origin is int else int | float) and not isinstance(value, bool)
    if origin in (bool, str, type(None)):
        return isinstance(value, origin)
    if _is(origin, Mapping):
        return isinstance(value, Mapping)
    return not _is(origin, Sequence) or (isinstance(value, Sequence) and not isinstance(value, str))


def _said(hint: Any) -> str:
    """A type in words: `a number or null`."""
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_said(option) for option in typing.get_args(hint)))
    if origin in _WORDS:
        return _WORDS[origin]
    return "a mapping" if _is(origin, Mapping) else "a list"


def _is(origin: Any, kind: type) -> bool:
    return isinstance(origin, type) and issubclass(origin, kind)
