"""VeLoRA: LoRA that keeps rank-1 sub-tokens for the backward (Miles et al. 2024, arXiv:2405.17991).

    y = W x + s · B (A x),     s = alpha / r;     dA from x̂ = ρ · (x_g · e) e for each group g of features, not from x

Of x only one number for each group is kept until the backward, where dA comes from x̂; dB and what goes on to the layers
below are exact. e is the mean of all groups as a unit vector: of each batch, of the first one, or drawn at random.
Outside training it is LoRA. B starts at zero, so the model starts as the base.

Parameters: r · (in + out) for each linear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError
from inlay.methods.lora import LoRA
from inlay.pieces.lora.compressed import PROJECTIONS, CompressedLoRAPiece

NAMES = {"num_groups": "num_groups", "rho": "scale", "projection": "init_type"}
"""Our fields by what peft's velora_config calls them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeLoRA(LoRA):
    """LoRA whose gradient of A is made from one number for each group of x, so that x is not kept."""

    kind = "velora"
    hosts = frozenset({"linear"})
    peft_variant = "velora_config"
    paper = "Miles et al. 2024, arXiv:2405.17991"

    num_groups: int = 64
    """Groups of features, of each of which one number is kept: more are nearer to x and take more memory."""
    rho: float = 1.0
    """Factor ρ on what stands for x in the backward."""
    projection: Literal["batch_average", "batch_average_once", "random"] = "batch_average"
    """Where e comes from: the mean of each batch, that of the first one, or chance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.num_groups) is not int or self.num_groups < 1:
            raise ConfigError(f"VeLoRA(num_groups={self.num_groups!r}): a whole number of at least 1 is needed")
        if not isinstance(self.rho, int | float) or not 0 < self.rho < float("inf"):
            raise ConfigError(f"VeLoRA(rho={self.rho!r}): a number above 0 is needed")
        if self.projection not in PROJECTIONS:
            raise ConfigError(f"VeLoRA(projection={self.projection!r}): choose one of {', '.join(PROJECTIONS)}")
        if self.init in ("olora", "pissa", "loftq") or self.precision == "exact":
            field = f"init={self.init!r}" if self.precision == "model" else "precision='exact'"
            raise ConfigError(f"VeLoRA({field}): it has none; leave it out, or use LoRA")

    def piece(self, site: Site) -> Piece:
        return CompressedLoRAPiece(self, site)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        entry = {theirs: getattr(self, ours) for ours, theirs in NAMES.items()}
        return super().to_peft(sites, index) | {self.peft_variant: entry}

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        entry = config[cls.peft_variant]
        return super().fields_from_peft(config) | {
            ours: entry[theirs] for ours, theirs in NAMES.items() if theirs in entry
        }
