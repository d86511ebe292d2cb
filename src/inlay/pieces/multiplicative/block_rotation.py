"""Blocks of the input, each rotated by a matrix of its own, and what keeps them near the identity (COFT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inlay.engine.controller import Controller
from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.kernels import rotations
from inlay.kernels.choice import without_autocast
from inlay.pieces.input_rotation import InputRotation, nearest_divisor


class OFTPiece(InputRotation):
    """The entries of the Q_i above their diagonals, row by row: `oft_R.weight` (n, b (b − 1) / 2).

    An embedding reads ids, which nothing turns: there it is the rows that are looked up, by `oft_embedding_R.weight`.
    """

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        self.size = site.out_features if self.kind == "embedding" else self.size
        blocks = nearest_divisor(method.r or method.block_size, self.size, f"OFT at {site.name}")
        self.block = self.size // blocks if method.r else blocks
        self.terms = method.num_cayley_neumann_terms if method.use_cayley_neumann else 0
        self.eps = method.eps if method.coft else 0.0
        number = 1 if method.block_share else self.size // self.block
        zeros = torch.zeros(number, self.block * (self.block - 1) // 2, **self.place)
        self.name = "oft_embedding_R" if self.kind == "embedding" else "oft_R"
        setattr(self, self.name, nn.ParameterDict({"weight": zeros}))

    @property
    def free(self) -> Tensor:
        """What is trained."""
        weight: Tensor = getattr(self, self.name)["weight"]
        return weight

    def entries(self) -> Tensor:
        """What Q is made of, within COFT's bound."""
        entries = self.free
        return rotations.projected(entries, self.eps) if self.eps else entries

    def turned(self, x: Tensor, inverse: bool = False) -> Tensor:
        q = rotations.skew(self.entries(), self.block)
        change = rotations.neumann(q, self.terms) if self.terms else rotations.cayley(-q)
        return rotations.rotated(x, change.mT if inverse else change)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.kind != "embedding":
            return super().forward(inner, x, *args, **kwargs)
        rows = inner(x, *args, **kwargs)
        with without_autocast(rows):
            return self.turned(rows)

    def weight(self, weight: Tensor) -> Tensor:
        if self.kind != "embedding":
            return super().weight(weight)
        return self.turned(weight.to(torch.promote_types(weight.dtype, self.place["dtype"])))


class Projection(Controller):
    """Keeps COFT's parameters within their bound."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        self.pieces = [piece for piece in pieces.values() if isinstance(piece, OFTPiece)]

    def after_step(self, optimizer: Optimizer) -> None:
        with torch.no_grad():
            for piece in self.pieces:
                piece.free.copy_(piece.entries())
