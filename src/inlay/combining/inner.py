"""The rest of an onion whose output for one input is known, so that several adapters around it compute it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inlay.engine.host import Inner
from inlay.engine.linear import Linear


class Known(Inner):
    """`inner`, whose output for these very arguments is `output()`; for others (a rotated input), it is called.

    `output` is called at most once for all that share it when it is a `Once`.
    """

    def __init__(self, inner: Inner, args: tuple[Any, ...], output: Callable[[], Any]) -> None:
        super().__init__(inner.inlays, inner.base, inner.piece, inner.inner)
        self.args = args
        self.output = output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What is known, or the output of `inner`."""
        if len(args) == len(self.args) and all(a is b for a, b in zip(args, self.args, strict=True)):
            return self.output()
        return super().__call__(*args, **kwargs)

    def linear(self) -> Linear | None:
        """None: a kernel that computed the base along with more would compute it again."""
        return None


class Once:
    """A computation made when it is first asked for, and kept."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self.compute = compute
        self.found: list[Any] = []

    def __call__(self) -> Any:
        """The result, the same each time."""
        if not self.found:
            self.found.append(self.compute())
        return self.found[0]


def around(inner: Inner, parts: tuple[Any, ...]) -> Inner:
    """The call's pieces of these adapters, in order, around `inner`."""
    for piece in inner.inlays.pieces(parts, None):
        inner = Inner(inner.inlays, inner.base, piece, inner)
    return inner
