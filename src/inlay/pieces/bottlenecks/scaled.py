"""A bottleneck whose output is scaled channel by channel, and left out of whole examples at random in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import trainable_dtype
from inlay.engine.sites import Site
from inlay.pieces.bottlenecks.bottleneck import Bottleneck


class ScaledBottleneck(Bottleneck):
    """A(x) = g ⊙ (W_up f(W_down x + b_down) + b_up), g (d) starting at one."""

    def __init__(self, into: int, width: int, out: int, method: Any, site: Site, drop_path: float) -> None:
        super().__init__(into, width, out, method, site)
        self.gain = nn.Parameter(torch.ones(out, dtype=trainable_dtype(site.dtype), device=site.device))
        self._drop_path = drop_path

    def widen(self, z: Tensor) -> Tensor:
        y = super().widen(z)
        if self.training and self._drop_path:  # stochastic depth: one draw for each example
            kept = torch.rand(len(y), *[1] * (y.dim() - 1), device=y.device) >= self._drop_path
            y = y * kept.to(y.dtype) / (1 - self._drop_path)
        return self.gain.to(y.dtype) * y
