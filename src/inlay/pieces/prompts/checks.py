"""What all methods that train prompts check of their fields."""

from __future__ import annotations

from typing import Any

from inlay.engine.piece import Method
from inlay.errors import ConfigError


def check_counts(method: Method, *names: str, optional: str | None = None) -> None:
    """Raise ConfigError for a field that is no whole number of at least 1; `optional`: one that may also be None."""
    if optional is not None and getattr(method, optional) is not None:
        names = (*names, optional)
    for name in names:
        value = getattr(method, name)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{type(method).__name__}({name}={value}): it must be 1 or more")


def check_start(method: Any) -> None:
    """Raise ConfigError where a prompt with an encoder is to start from more than one; lists of YAML become tuples."""
    name, encoder = type(method).__name__, None if method.deep else method.encoder
    for field in ("init_from", "init_weights"):
        if isinstance(getattr(method, field), list):
            object.__setattr__(method, field, tuple(getattr(method, field)))
    if method.init_weights is not None and not isinstance(method.init_from, tuple):
        raise ConfigError(f"{name}(init_weights={method.init_weights}) needs init_from=, several folders")
    if method.init_from == ():
        raise ConfigError(f"{name}(init_from=()): name at least one folder, or leave it out")
    if isinstance(method.init_from, tuple) and encoder is not None:
        raise ConfigError(
            f"{name}(init_from={method.init_from!r}, encoder={encoder!r}): encoders have no mean; name one folder, or "
            "use encoder=None"
        )


def check_entry(method: Method) -> None:
    """Raise ConfigError where a method that sits at the model's entry is told another place."""
    if method.targets is not None or method.exclude is not None or method.layers is not None or method.overrides:
        raise ConfigError(f"{type(method).__name__} sits at the model's entry: it has no targets, layers or overrides")
