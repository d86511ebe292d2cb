"""Adapters that run in another way than one after the other: what `activate` takes beside names.

A `Composition` is data (`inlay.combining.composition` has them all). In one model it becomes `Bound`: a part of what is
active, which at each host gives one layer of the onion in the place of the pieces of its adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from inlay.engine.adapters import Adapters
    from inlay.engine.host import Inlays
    from inlay.engine.piece import Piece


class Bound:
    """A composition in one model."""

    of: Composition
    names: tuple[str, ...]
    """The adapters in it."""

    def pieces(self, inlays: Inlays, parameter: str | None) -> Iterator[Piece]:
        """What runs in one host on `parameter` (None: on the module's call)."""
        raise NotImplementedError

    def start(self, model: nn.Module, parts: tuple[str | Bound, ...]) -> None:
        """Called before it becomes active as one of these parts."""

    def bind(self, adapters: Adapters) -> tuple[str | Bound, ...]:
        """Itself, to be active again."""
        return (self,)


class Composition:
    """Adapters put together."""

    def bind(self, adapters: Adapters) -> tuple[str | Bound, ...]:
        """The parts that this is, in order. AdapterError, ConfigError or UnsupportedError for what cannot be."""
        raise NotImplementedError


def names_in(parts: tuple[str | Bound, ...]) -> tuple[str, ...]:
    """The adapters that run, in order."""
    return tuple(name for part in parts for name in ((part,) if isinstance(part, str) else part.names))
