"""Methods that show an attention more than the text: its config names a function of ours while they are attached."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from inlay.engine.piece import Method, Piece
from inlay.engine.prompts.attention import AttentionPiece, switch_off, switch_on

if TYPE_CHECKING:
    from inlay.engine.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttendingMethod(Method):
    """A method with an `AttentionPiece` on each of its attentions."""

    def on_attach(self, model: nn.Module, pieces: Sequence[tuple[Site, Piece]]) -> None:
        """Have the attentions' configs name the function that knows these pieces."""
        placed = [(site, piece) for site, piece in pieces if isinstance(piece, AttentionPiece)]
        switch_on([piece for _, piece in placed], [site for site, _ in placed])

    def on_detach(self, model: nn.Module, pieces: Sequence[tuple[Site, Piece]]) -> None:
        """Give the configs back their names."""
        switch_off(model, [piece for _, piece in pieces if isinstance(piece, AttentionPiece)])
