"""Lily: low-rank adapters that are interconnected across layers (Zhong et al. 2024, arXiv:2407.09946).

    y = W x + s · (Σ_e p_e B_e)ᵀ A x,     p = mean over the batch's rows of softmax(R A x)

Places of one name and shape share n matrices B_e; `stride_A` neighbours among them share A; the router R is each
place's own. All B start at zero, so the model starts as the base.

Parameters: r n for each place, r in for each A, n r out for each group of places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.pieces.interconnected import Interconnected, LilyPiece, check_alike, grouped, sharing_targets
from inlay.pieces.linear import named
from inlay.pieces.projections import Placed, Shared, SharingMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lily(SharingMethod):
    """A few A, shared by neighbouring layers, and B, mixed for each batch out of those that all layers share."""

    kind = "lily"
    default_targets = "query,value"
    peft_type = "LILY"
    paper = "Zhong et al. 2024, arXiv:2407.09946"
    peft_conv1d = False
    common = frozenset({"r", "stride_A", "num_B", "share"})

    r: int = named("r", 32)
    """Rank of the change; two to four times what a LoRA would have, since the matrices are fewer."""
    stride_A: int = named("stride_A", 1)
    """How many consecutive places of a group share one A."""
    num_B: int = named("num_B", 2)
    """How many B a group has, n."""
    scale: float = named("scaling", 1.0)
    """s, by which the change is multiplied."""
    sharing: Sequence[str] | None = None
    """A group's places have one shape, and paths that end in the same of these names; None: in the same last part."""

    def __post_init__(self) -> None:
        self.check_whole("r", "stride_A")
        self.check_whole("num_B", least=2)
        self.check_number("scale")
        object.__setattr__(self, "sharing", None if self.sharing is None else tuple(self.sharing))

    def piece(self, site: Site) -> Piece:
        return LilyPiece(self, site)

    def share(self, placed: Placed) -> Shared:
        groups = grouped([site for site, _ in placed], self.sharing)
        return Interconnected(placed, groups, self.r, self.stride_A, self.num_B)

    # -- files -------------------------------------------------------------------------------------------------------

    def import_(self, pieces: Placed, tensors: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
        check_alike(self.export(pieces)[0], tensors)
        super().import_(pieces, tensors, extra)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        entries = super().to_peft(sites, index)
        return {**entries, "target_modules": sharing_targets(entries["target_modules"], self.sharing, sites, index)}

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        names = config.get("target_modules")
        sharing = (names and ("",)) if isinstance(names, str) else sorted(names or ()) or None
        return {**super().fields_from_peft(config), "sharing": None if names == "all-linear" else sharing}
