"""LoKr: low-rank Kronecker product (Yeh et al. 2023, arXiv:2309.14859, in LyCORIS; KronA, Edalati et al. 2022).

    W′ = W + s · W₁ ⊗ W₂,     s = alpha / r

W₁ (l, m) and W₂ (k, n), with out = l k and in = m n, are each a full matrix or, above a size, a product of rank r. The
rank of the change is that of W₁ times that of W₂. On linears it is applied by reshaping x, and no product is formed.
W₁ starts at zero, so the model starts as the base.

Parameters: l m + r (k + n), or l m + k n where that is small; a convolution counts n as channels times kernel.
"""

from __future__ import annotations

import dataclasses

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.pieces.deltas.kronecker import LoKrPiece
from inlay.pieces.linear import LinearMethod, named


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
