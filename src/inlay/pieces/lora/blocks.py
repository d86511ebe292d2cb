"""LoRA's piece with a block-diagonal A or B, of which only the blocks are kept, one under the other."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels import lora as kernel
from inlay.kernels import low_rank
from inlay.pieces.lora.piece import LoRAPiece


def diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """The blocks on the diagonal of a matrix (rows, columns), one under the other: (rows, columns / count)."""
    rows, columns = (size // count for size in matrix.shape)
    blocks = matrix.reshape(count, rows, count, columns)
    return torch.stack([blocks[n, :, n] for n in range(count)]).reshape(-1, columns)


class BlockLoRAPiece(LoRAPiece):
    """s · B A x, where A (r, in / n) or B (out, r / n) stands for the matrix that has its n blocks on the diagonal."""

    def __init__(self, method: Any, site: Site, blocks: str) -> None:
        super().__init__(method, site)
        self.blocks, self.count = blocks, method.nblocks
        size = {"a": site.in_features, "b": site.out_features}.get(blocks, 0)
        if size % self.count:
            raise ConfigError(f"BDLoRA(nblocks={self.count}) does not divide the {size} features of {site.name}")
        name = f"lora_{blocks.upper()}"
        if blocks:
            dense = getattr(self, name)
            kept = diagonal_blocks(dense.detach(), self.count) * (math.sqrt(self.count) if blocks == "a" else 1)
            setattr(self, name, nn.Parameter(kept) if isinstance(dense, nn.Parameter) else kept)

    def both(self) -> tuple[Tensor, Tensor, float]:
        """A (r, in) and B (out, r) with their zeros, and s."""
        a, b = self.lora_A, self.lora_B
        if self.blocks == "a":
            a = torch.block_diag(*a.chunk(self.count))  # type: ignore[no-untyped-call]
        if self.blocks == "b":
            b = torch.block_diag(*b.chunk(self.count))  # type: ignore[no-untyped-call]
        return a, b, self.scale

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        (a, b, scale), p = self.both(), self.dropout if self.training else 0.0
        if self.plain and not args and not kwargs:
            return kernel.adapted(inner, x, a, b, scale, p)
        y = inner(x, *args, **kwargs)
        x = x.to(a.dtype) if self.exact else x
        return y + (scale * low_rank.linear(F.dropout(x, p) if p else x, a, b)).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return self.both()

    def delta(self) -> Tensor:
        a, b, scale = self.both()
        return scale * (b @ a)

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta()

    def values_of(self, other: Piece) -> list[tuple[Tensor, Tensor]]:
        return Piece.values_of(self, other)  # a lower rank has its zeros in other rows of each block
