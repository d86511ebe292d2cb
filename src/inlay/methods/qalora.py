"""QA-LoRA: a LoRA that folds into a group-wise quantised weight (Xu et al. 2023, arXiv:2309.14717).

    y = W x + s · c · B A x̄,     x̄_j the mean of the g inputs of group j,     s = alpha / r

    c = g: A reads sums, as in the paper;  1: means, as in its authors' code;  in / g, as in HF peft

The change is one number for each output and group of inputs, which is what a group-wise quantised weight keeps as its
zero point: folded into these (`kernels.zero_points`), the codes and the outputs stay as they are. Of x only x̄ is kept
for the backward. B starts at zero, so the model starts as the base.

Parameters: r · (in / g + out) for each linear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError, UnsupportedError
from inlay.methods.lora import LoRA
from inlay.pieces.lora.pooled import POOLINGS, PooledLoRAPiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class QALoRA(LoRA):
    """y = W x + s · c · B A x̄: LoRA on the means of groups of inputs, which folds into a quantised weight."""

    kind = "qalora"
    hosts = frozenset({"linear"})
    peft_variant = "use_qalora"
    paper = "Xu et al. 2023, arXiv:2309.14717"

    group_size: int = 32
    """Inputs g of a group: as many as the quantised weight has for each zero point, or a multiple of that."""
    pooling: Literal["sum", "mean", "groups"] = "sum"
    """The factor c on the mean: g, 1, or the number of groups, with which HF peft reads the file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.group_size) is not int or self.group_size < 1:
            raise ConfigError(f"QALoRA(group_size={self.group_size!r}): a whole number of at least 1 is needed")
        if self.pooling not in POOLINGS:
            raise ConfigError(f"QALoRA(pooling={self.pooling!r}): choose one of {', '.join(POOLINGS)}")
        if self.init in ("olora", "pissa", "loftq"):
            raise ConfigError(f"QALoRA(init={self.init!r}): no factor of W is alike within groups; leave it out")

    def piece(self, site: Site) -> Piece:
        return PooledLoRAPiece(self, site)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        if self.pooling != "groups" or any(site.transposed for site in sites if site.parameter != "bias"):
            raise UnsupportedError("HF peft has QA-LoRA on GPTQ linears, with the mean times the number of groups")
        if any(getattr(self.at(site), "group_size", 0) != self.group_size for site in sites):
            raise UnsupportedError("HF peft has one qalora_group_size for all places")
        return super().to_peft(sites, index) | {self.peft_variant: True, "qalora_group_size": self.group_size}

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        known = {"group_size": config.get("qalora_group_size", 16), "pooling": "groups"}
        return super().fields_from_peft(config) | known
