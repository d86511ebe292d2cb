"""Which feed-forward networks are watched: the first projections of those whose second ones are named."""

from __future__ import annotations

from collections.abc import Sequence

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.structure import ancestors
from inlay.pieces.density.watching import ActivationPiece, Watch


def firsts(index: SiteIndex, seconds: Sequence[Site]) -> list[Site]:
    """The first projections of the networks whose second ones these are: the nearest ones around each."""
    ups = [site for site in index.sites if site.kind == "linear" and site.roles & {"up", "gate"}]
    found: list[Site] = []
    for second in seconds:
        for above in ancestors(second.path):
            near = [site for site in ups if f"{site.path}.".startswith(f"{above}.") and site is not second]
            if near or any(above == site.path for site in index.sites if "block" in site.roles):
                found += near
                break
    return found


def watch_of(pieces: Sequence[tuple[object, Piece]]) -> Watch:
    """What the pieces share."""
    return next(piece.watch for _, piece in pieces if isinstance(piece, ActivationPiece))
