"""TinyLoRA: a handful of numbers for a whole model (Morris et al. 2026, arXiv:2602.04118).

    ΔW = B (Σ_i v_i P_i) A,     U S Vᵀ ≈ W,     A = √S Vᵀ (r, in),     B = U √S (out, r)

A and B come from the r largest singular values of W, the P_i (r, r) are random; both are frozen. Only v (u) is trained,
and `weight_tying` lets several places share one. On an embedding W is the table, and rows of B are looked up. v starts
at zero, so the model starts as the base.

Parameters: u for each group of places that share v.
"""

from __future__ import annotations

import dataclasses

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.pieces.linear import named
from inlay.pieces.projections import Placed, Shared, SharingMethod
from inlay.pieces.sharing.singular_core import TinyLoRAPiece, Vectors


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyLoRA(SharingMethod):
    """ΔW = B (Σ_i v_i P_i) A: u trained numbers between frozen factors of W, for one place or for all."""

    kind = "tinylora"
    hosts = frozenset({"linear", "embedding"})
    default_targets = "query,value"
    peft_type = "TINYLORA"
    paper = "Morris et al. 2026, arXiv:2602.04118"
    peft_constants = (("bias", "none"),)
    common = frozenset({"u", "weight_tying", "seed", "save_projection"})

    r: int = named("r", 2)
    """How many singular values of W the change lies in."""
    u: int = named("u", 64)
    """Entries of v."""
    weight_tying: float = named("weight_tying", 0.0)
    """How far places share v: at 0 each has its own, at 1 all have one, between them neighbours share."""
    dropout: float = named("tinylora_dropout", 0.0)
    """Probability of zeroing an entry of x before A, in training."""
    seed: int = named("projection_seed", 42)
    """What the P_i of the first place are drawn from; the next one's from seed + 1, and so on."""
    save_projection: bool = named("save_projection", True)
    """Write the P_i into the file too, and not rely on the seed's giving the same again."""

    def __post_init__(self) -> None:
        self.check_whole("r", "u")
        self.check_whole("seed", least=0)
        self.check_rate("dropout")
        if not isinstance(self.weight_tying, int | float) or not 0 <= self.weight_tying <= 1:
            raise ConfigError(f"TinyLoRA(weight_tying={self.weight_tying!r}): a number from 0 to 1 is needed")

    def piece(self, site: Site) -> Piece:
        return TinyLoRAPiece(self, site)

    def share(self, placed: Placed) -> Shared:
        groups = max(1, round(len(placed) * (1 - self.weight_tying)))
        for number, (_, piece) in enumerate(placed):
            assert isinstance(piece, TinyLoRAPiece)
            piece.group = min(number // (len(placed) // groups), groups - 1)
            piece.draw(self.seed + number)
        return Vectors(groups, self.u, placed)
