"""A Kronecker product of two matrices, each full or of low rank, added to a weight."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from inlay.engine.sites import Site
from inlay.errors import UnsupportedError
from inlay.kernels import grids
from inlay.pieces.linear import DeltaPiece


class LoKrPiece(DeltaPiece):
    """W₁ as w1 (l, m) or w1_a (l, r) and w1_b (r, m), and W₂ likewise, by HF peft's names."""

    scale: float

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        r, (out, inside, *kernel) = method.r, self.weight_shape
        (l, k), (m, n) = (grids.split(size, method.decompose_factor) for size in (out, inside))  # noqa: E741
        self.scale, thin = method.alpha / r, 2 * r < max(k, n)
        if len(kernel) == 1 and not thin:  # HF peft has the entries of such a product in another order
            reason = "on 1-D convolutions W₂ has to be of low rank"
            raise UnsupportedError(f"LoKr(r={r}) cannot sit at {site.name}: {reason}, so r below {max(k, n) / 2:g}")
        self.keep("lokr_w1", r if method.decompose_both and 2 * r < max(l, m) else 0, l, m, value=0.0)
        self.keep("lokr_w2", r if thin else 0, k, n, *kernel)

    def keep(self, name: str, r: int, *shape: int, value: float | None = None) -> None:
        """Train a matrix of this shape: as a product of rank r, or for 0 as it is."""
        if r:
            self.register_parameter(f"{name}_a", self.start(shape[0], r, value=value))
            self.register_parameter(f"{name}_b", self.start(r, math.prod(shape[1:])))
        else:
            self.register_parameter(name, self.start(*shape, value=value))

    def matrices(self, name: str) -> list[Tensor]:
        """The one or two matrices whose product is this one."""
        return [tensor.flatten(1) for key, tensor in self.named_parameters() if key.startswith(name)]

    def first(self) -> Tensor:
        """s · W₁."""
        return self.scale * functools.reduce(torch.matmul, self.matrices("lokr_w1"))

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.kind != "linear":
            return super().forward(inner, x)
        wide, *narrow = self.matrices("lokr_w2")
        if narrow:
            return grids.kronecker(inner(x), x, self.first(), narrow[0], wide)
        widens = wide.shape[0] > wide.shape[1]  # the side that it leads to is left for last
        return grids.kronecker(inner(x), x, self.first(), *((None, wide) if widens else (wide, None)))

    def delta(self) -> Tensor:
        second = functools.reduce(torch.matmul, self.matrices("lokr_w2"))
        return grids.kronecker_delta(self.first(), second).view(self.weight_shape)
