"""AdapterDrop in one model: x through the branch, or past it in the first blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from inlay.combining.bound import BoundBranches, Composed, Parts
from inlay.engine.adapters import Adapters
from inlay.engine.composition import Composition
from inlay.engine.host import Inlays, Inner
from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.pieces.bottlenecks.bottleneck import AdapterPiece
from inlay.pieces.recalled import recalled


class BoundDrop(BoundBranches):
    """Its branch, but for the blocks below `first`."""

    def __init__(self, of: Composition, branch: Parts, adapters: Adapters, pair: tuple[int, int]) -> None:
        super().__init__(of, (branch,), adapters)
        self.pair = pair
        self.first = pair[0]
        self.layers: list[tuple[nn.Module, int | None]] = [
            (site.module, site.layer) for name in self.names for site, _ in adapters.loaded[name].pieces()
        ]

    def takes(self, site: Site, piece: Piece) -> bool:
        """Whether a piece can be left out of its block alone."""
        return super().takes(site, piece) or isinstance(piece, AdapterPiece)

    def piece(self, inlays: Inlays, parameter: str | None) -> Piece | None:
        """The layer at one host; nothing where it never runs."""
        layer = next((layer for module, layer in self.layers if module is inlays.host), None)
        if layer is not None and layer < self.pair[0]:
            return None
        made = super().piece(inlays, parameter)
        return Dropping(self, made.reads, layer) if isinstance(made, Composed) else made

    def compute(self, inner: Inner, reads: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the branch."""
        return self.through(self.branches[0], inner, reads, args, kwargs)

    def entries(self) -> list[Piece]:
        """Where there is a choice, it is made once a forward pass."""
        drawn = [Draw(self)] if self.pair[0] < self.pair[1] else []
        return [*super().entries(), *drawn]


class Dropping(Composed):
    """At one host of a known block: the branch, or what lies inside alone."""

    bound: BoundDrop

    def __init__(self, bound: BoundDrop, reads: bool, layer: int | None) -> None:
        super().__init__(bound, reads)
        self.layer = layer

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's output."""
        if self.layer is not None and self.layer < self.bound.first:
            return inner(*args, **kwargs)
        return super().forward(inner, *args, **kwargs)


class Draw(Piece):
    """Around the model: how many blocks this forward pass leaves out."""

    def __init__(self, bound: BoundDrop) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        least, most = self.bound.pair
        first = int(torch.randint(least, most + 1, ())) if inner.module.training else least
        self.bound.first = first
        output = inner(*args, **kwargs)
        recalled(output, lambda: setattr(self.bound, "first", first))
        return output
