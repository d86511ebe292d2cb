"""LoKr: low-rank Kronecker product (Yeh et al. 2023, arXiv:2309.14859, in LyCORIS; KronA, Edalati et al. 2022).

    W′ = W + s · W₁ ⊗ W₂,     s = alpha / r

W₁ (l, m) and W₂ (k, n), with out = l k and in = m n, are each a full matrix or, above a size, a product of rank r. The
rank of the change is that of W₁ times that of W₂. On linears it is applied by reshaping x, and no product is formed.
W₁ starts at zero, so the model starts as the base.

Parameters: l m + r (k + n), or l m + k n where that is small; a convolution counts n as channels times kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.kernels import grids
from inlay.pieces.linear import DeltaPiece, LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(LinearMethod):
    """ΔW = s · W₁ ⊗ W₂: a small matrix of scaled copies of another, which is of low rank."""

    kind = "lokr"
    hosts = frozenset({"linear", "conv"})
    default_targets = "query,value"
    peft_type = "LOKR"
    paper = "Yeh et al. 2023, arXiv:2309.14859"
    peft_constants = (("rank_dropout", 0.0), ("module_dropout", 0.0), ("use_effective_conv2d", False))
    peft_conv1d = False
    peft_convolutions = frozenset({1, 2})

    r: int = named("r", 8, "rank_pattern")
    """Rank of W₂, and of W₁ with `decompose_both`, where less than half its larger side; else they are full."""
    alpha: float = named("alpha", 8, "alpha_pattern")
    """Numerator of the scale s."""
    decompose_both: bool = named("decompose_both", False)
    """Whether W₁ may be of low rank too."""
    decompose_factor: int = named("decompose_factor", -1)
    """Sides of W₁ where it divides those of W, else their upper bound; -1 for sides near their square roots."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_number("alpha")
        self.check_whole("decompose_factor", least=-1)
        if not self.decompose_factor:
            raise ConfigError("LoKr(decompose_factor=0): a whole number of at least 1 is needed, or -1")

    def piece(self, site: Site) -> Piece:
        return LoKrPiece(self, site)


class LoKrPiece(DeltaPiece):
    """W₁ as w1 (l, m) or w1_a (l, r) and w1_b (r, m), and W₂ likewise, by HF peft's names."""

    def __init__(self, method: LoKr, site: Site) -> None:
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
