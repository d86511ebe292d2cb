"""A composition in one model: at each host, one layer of the onion that runs its branches inside it.

What lies inside is computed once, for all of x: a branch that asks for the output for its slice is given the slice of
the output (`inner.Known`). Trained copies of parameters are read by the branch that runs (`Reading`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from inlay.combining.inner import around
from inlay.combining.over_adapters import OverPiece
from inlay.engine.adapters import ATTRIBUTE, Adapters
from inlay.engine.bank import ROWS_STAY, Bank, together
from inlay.engine.composition import Bound, Composition, names_in
from inlay.engine.host import Inlays, Inner, open_host
from inlay.engine.piece import Piece
from inlay.engine.sites import Site, kind_of
from inlay.errors import UnsupportedError
from inlay.pieces.bottlenecks.bottleneck import AfterPiece, BesidePiece

Parts = tuple[str | Bound, ...]
ONE_TENSOR = (AfterPiece, BesidePiece, OverPiece)
"""Pieces around whole modules that call what is inside once, with what they were given."""


class BoundBranches(Bound):
    """Base: branches, and one `Composed` at each host where one of their adapters sits."""

    def __init__(self, of: Composition, branches: tuple[Parts, ...], adapters: Adapters) -> None:
        self.of = of
        self.branches = branches
        self.names = tuple(dict.fromkeys(name for branch in branches for name in names_in(branch)))
        self.running: Parts = ()
        """The branch whose trained copies are read now."""
        self._made: dict[tuple[int, str | None], list[Piece]] = {}
        for name in self.names:
            for site, piece in adapters.loaded[name].pieces():
                if not self.takes(site, piece):
                    raise UnsupportedError(
                        f"{of!r} cannot run the adapter {name!r}: {type(piece).__name__} at "
                        f"{site.name or 'the model itself'} acts on more than single places; activate it by itself"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    def takes(self, site: Site, piece: Piece) -> bool:
        """Whether a piece can run in a branch."""
        plain = kind_of(site.module) in ROWS_STAY and site.owner is None and "expert" not in site.path
        return plain or isinstance(piece, ONE_TENSOR)

    def compute(self, inner: Inner, reads: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A host's output; `reads`: some branch has trained copies of its parameters."""
        raise NotImplementedError

    def through(self, branch: Parts, inner: Inner, reads: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of one branch around `inner`."""
        onion = around(inner, branch)
        if not reads:
            return onion(*args, **kwargs)
        inlays = inner.inlays
        before = self.running, inlays.held
        self.running, inlays.held = branch, None
        try:
            return onion(*args, **kwargs)
        finally:
            self.running, inlays.held = before

    # -- at the hosts ------------------------------------------------------------------------------------------------

    def pieces(self, inlays: Inlays, parameter: str | None) -> Iterator[Piece]:
        """What runs in one host, made once."""
        key = id(inlays), parameter
        if key not in self._made:
            piece = self.piece(inlays, parameter)
            around_all = self.entries() if parameter is None and ATTRIBUTE in inlays.host.__dict__ else []
            self._made[key] = around_all if piece is None else [*around_all, piece]
        return iter(self._made[key])

    def piece(self, inlays: Inlays, parameter: str | None) -> Piece | None:
        """The layer at one host; None where no adapter sits."""
        own = [piece for name in self.names for piece in inlays.all_pieces(name)]
        if parameter is not None:
            return Reading(self, inlays, parameter) if any(p.parameter == parameter for p in own) else None
        return Composed(self, any(p.parameter is not None for p in own)) if own else None

    def entries(self) -> list[Piece]:
        """What runs around the whole model."""
        inside = (part for branch in self.branches for part in branch if isinstance(part, BoundBranches))
        return [piece for part in inside for piece in part.entries()]

    def start(self, model: nn.Module, parts: Parts) -> None:
        """Make the model a host where something runs around it; `detach` undoes that with the last adapter."""
        if self.entries():
            adapters: Adapters = model.__dict__[ATTRIBUTE]
            open_host(model, adapters.state, False)


class Composed(Piece):
    """The branches at one host."""

    def __init__(self, bound: BoundBranches, reads: bool) -> None:
        super().__init__()
        self.bound = bound
        self.reads = reads

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's output."""
        return self.bound.compute(inner, self.reads, args, kwargs)


class Reading(Piece):
    """A parameter as the branch that runs reads it; between branches, the base's."""

    stored = True

    def __init__(self, bound: BoundBranches, inlays: Inlays, parameter: str) -> None:
        super().__init__()
        self.bound = bound
        self.at = [inlays]  # not as a child: it belongs to its host
        self.parameter = parameter

    def weight(self, weight: Tensor) -> Tensor:
        """W' of the branch."""
        for piece in self.at[0].pieces(self.bound.running, self.parameter):
            weight = piece.weight(weight)
        return weight


def banked(bound: BoundBranches, inlays: Inlays, parameter: str | None, settle: Callable[[Bank], None]) -> Piece | None:
    """The branches of single adapters as one piece (`Piece.together`); None where they are more, or there is none."""
    single = all(len(branch) == 1 and isinstance(branch[0], str) for branch in bound.branches if branch)
    if parameter is not None or not single or sum(map(len, bound.branches)) != len(bound.names):
        return None
    found = {number: tuple(inlays.all_pieces(name)) for number, name in enumerate(bound.names)}
    present = {number: pieces for number, pieces in found.items() if pieces}
    if not present or any(piece.parameter is not None for pieces in present.values() for piece in pieces):
        return None
    bank = Bank(bound.names, next(iter(inlays.parameters())).device)
    settle(bank)
    return together(present, bank)
