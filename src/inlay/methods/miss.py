"""MiSS: matrix shard sharing (Kang, Yin 2024, arXiv:2409.15371, first known as Bone).

    plain:  W′ = W + [D D … D]ᵀ        D (r, out), repeated along the inputs
    mini:   the same with D (r, mini_r), repeated along the outputs too
    bat:    W′_pq = W_pq + (W_pq + I) D_p      for each block W_pq of r × r, D (out / r, r, r)

A LoRA whose A is fixed: it adds up the inputs r apart. D starts at zero, so the model starts as the base.

Parameters: r out; r mini_r for mini. BERT-base, query and value, r = 64: 24 · 64 · 768 = 1,179,648.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import UnsupportedError
from inlay.pieces.deltas.shards import BatPiece, MiSSPiece
from inlay.pieces.linear import LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiSS(LinearMethod):
    """ΔW is one block D, shared by all shards of the input: half of LoRA's parameters."""

    kind = "miss"
    default_targets = "query,value"
    peft_type = "MISS"
    paper = "Kang, Yin 2024, arXiv:2409.15371"
    peft_constants = (("bias", "none"),)
    peft_conv1d = False

    r: int = named("r", 64)
    """Inputs in a shard, and rank of the change."""
    variant: Literal["plain", "bat", "mini"] = named("init_weights", "plain")
    """"bat" lets W take part, "mini" repeats D along the outputs too."""
    mini_r: int = named("mini_r", 1)
    """Outputs in a shard, for "mini"."""
    dropout: float = named("miss_dropout", 0.0)
    """Probability of dropping an entry of the input before the change."""

    def __post_init__(self) -> None:
        self.check_whole("r", "mini_r")
        self.check_choice("variant", ("plain", "bat", "mini"))
        self.check_rate("dropout")

    def piece(self, site: Site) -> Piece:
        reason = ""
        if self.r > site.in_features:
            reason = f"its {site.in_features} inputs are fewer than r={self.r}"
        elif self.variant == "bat" and (site.in_features % self.r or site.out_features % self.r):
            reason = f"r={self.r} does not divide {site.out_features} by {site.in_features}"
        elif self.variant == "mini" and site.out_features % self.mini_r:
            reason = f"mini_r={self.mini_r} does not divide {site.out_features}"
        if reason:
            raise UnsupportedError(f"MiSS cannot sit at {site.name}: {reason}")
        return (BatPiece if self.variant == "bat" else MiSSPiece)(self, site)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        entries = super().to_peft(sites, index)
        return {**entries, "init_weights": True} if self.variant == "plain" else entries

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().fields_from_peft(config)
        return {**fields, "variant": fields["variant"] if isinstance(fields.get("variant"), str) else "plain"}
