"""One block that all shards of a weight share, added to them as it is or multiplied by them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from inlay.engine.sites import Site
from inlay.kernels import grids
from inlay.pieces.linear import DeltaPiece
from inlay.pieces.relative import RelativePiece


class MiSSPiece(DeltaPiece):
    """D (r, out) or (r, mini_r), by HF peft's name."""

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        width = method.mini_r if method.variant == "mini" else self.shape[0]
        self.miss_block = self.start(method.r, width, value=0.0)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rate = self.dropout if self.training else 0.0
        return grids.sharded(inner(x), F.dropout(x, rate) if rate else x, self.miss_block)

    def form(self, *tensors: Tensor) -> Tensor:
        return grids.sharded_delta(tensors[0], self.shape)


class BatPiece(RelativePiece):
    """D (out / r, r, r), by HF peft's name."""

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        self.miss_block = self.start(self.shape[0] // method.r, method.r, method.r, value=0.0)

    def form(self, *tensors: Tensor) -> Tensor:
        block, weight = tensors
        return grids.block_affine_delta(weight, block)
