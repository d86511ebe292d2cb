"""What methods check of their fields: one sentence for each kind of value, before anything in a model is changed.

A field that is None by default may be None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any

from inlay.engine.piece import Method
from inlay.errors import ConfigError, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedMethod(Method):
    """A method with checks for its `__post_init__`."""

    def check_whole(self, *names: str, least: int = 1) -> None:
        """Raise ConfigError for a field that is no whole number of at least `least`."""
        for name, value in self._given(names):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise self.refused(name, f"a whole number of at least {least} is needed")

    def check_number(self, *names: str) -> None:
        """Raise ConfigError for a field that is no number other than 0."""
        for name, value in self._given(names):
            if not _finite(value) or not value:
                raise self.refused(name, "a number other than 0 is needed")

    def check_positive(self, *names: str) -> None:
        """Raise ConfigError for a field that is no number above 0."""
        for name, value in self._given(names):
            if not _finite(value) or value <= 0:
                raise self.refused(name, "a positive number is needed")

    def check_at_least_zero(self, *names: str) -> None:
        """Raise ConfigError for a field that is no number of 0 or more."""
        for name, value in self._given(names):
            if not _finite(value) or value < 0:
                raise self.refused(name, "a number of at least 0 is needed")

    def check_rate(self, *names: str) -> None:
        """Raise ConfigError for a field that is no probability below 1."""
        for name, value in self._given(names):
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise self.refused(name, "a probability in [0, 1) is needed")

    def check_choice(self, name: str, choices: Collection[Any]) -> None:
        """Raise ConfigError for a field that is none of these."""
        for _, value in self._given((name,)):
            if any(value == choice for choice in choices):
                continue
            near = did_you_mean(value, map(str, choices)) if isinstance(value, str) else ""
            raise self.refused(name, f"choose one of {', '.join(map(str, choices))}{near}")

    def refused(self, name: str, what: str) -> ConfigError:
        """The error for a field, saying what is needed."""
        return ConfigError(f"{type(self).__name__}({name}={getattr(self, name)!r}): {what}")

    def _given(self, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name in names:
            value = getattr(self, name)
            if value is not None or type(self).__dataclass_fields__[name].default is not None:
                yield name, value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
