"""RandLoRA: full rank from random bases (Albert et al. 2025, arXiv:2502.00987).

    ΔW = s · Σ_j B_j Λ_j A Γ_j,     j = 1 … n,     n = ⌈min(in, out) / r⌉,     s = alpha / r

A (r, the smaller side) and B_j (the larger side, r) are random, frozen and the same for all places; the diagonals Λ_j
and Γ_j are trained. (Where out is the smaller side, ΔW is the transpose of this.) The sum has full rank, so it runs as
two factors of rank n r only while the rows of x are few, and is formed where they are many. Λ starts at zero, so the
model starts as the base. Which columns of B' = [B_1 … B_n] make up B_j is HF peft's choice: every n-th one.

Parameters: n · (r + min(in, out)).
"""

from __future__ import annotations

import dataclasses

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.pieces.linear import named
from inlay.pieces.projections import Placed, Shared, SharingMethod
from inlay.pieces.sharing.random_bases import RandLoRAPiece, RandomBases


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoRA(SharingMethod):
    """ΔW = s · Σ_j B_j Λ_j A Γ_j: a change of full rank; of random matrices only the scales are trained."""

    kind = "randlora"
    default_targets = "query,value"
    peft_type = "RANDLORA"
    paper = "Albert et al. 2025, arXiv:2502.00987"
    peft_constants = (("bias", "none"),)
    common = frozenset({"r", "seed", "sparse", "very_sparse", "save_projection"})

    r: int = named("r", 32)
    """Rank of each basis; a lower one takes more of them, and more parameters."""
    alpha: float = named("randlora_alpha", 640)
    """Numerator of the scale s."""
    dropout: float = named("randlora_dropout", 0.0)
    """Probability of zeroing an entry of x, in training."""
    sparse: bool = named("sparse", False)
    """Bases of −1, 0 and 1, where two thirds are 0."""
    very_sparse: bool = named("very_sparse", False)
    """The same with one entry other than 0 in √(smaller side)."""
    seed: int = named("projection_prng_key", 0)
    """What A and B are drawn from."""
    save_projection: bool = named("save_projection", False)
    """Write A and B into the file too, as HF peft has it: once more for each place."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_whole("seed", least=0)
        self.check_number("alpha")
        self.check_rate("dropout")

    def piece(self, site: Site) -> Piece:
        return RandLoRAPiece(self, site)

    def share(self, placed: Placed) -> Shared:
        return RandomBases(self, placed)

    def writes(self, name: str) -> bool:
        return self.save_projection
