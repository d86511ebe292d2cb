"""ScaLearn (Frohmann et al. 2023, arXiv:2310.01217): trained scales of what several frozen adapters add.

    h + Σ_n ω_n ⊙ u_n        ω (N, d) at each place, without softmax: the scales need not sum to anything

    uniform    one number for each adapter and place: ω (N, 1)
    shared     one ω for all places: the variants that the paper writes with ++

u_n is what adapter n adds to the output h of the place. ω starts at N(2/N, 0.001²), so the start is near twice the mean
of the adapters, not the base; dropout, in training, is on ω. The target task's own adapter is one of the N.

Parameters, for L places of width d: N d L; uniform N L; shared N d; both N. BERT-base with 8 tasks: 73,728, 96, 6,144
and 8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.combining.over_adapters import OverAdapters, OverPiece
from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import UnsupportedError


class ScalePiece(OverPiece):
    """Σ_n ω_n ⊙ u_n at one place; `owns` its ω for the file, where several places share it."""

    def __init__(self, adapters: tuple[str, ...], scales: nn.Parameter, dropout: float, owns: bool) -> None:
        super().__init__(adapters)
        self.scales = scales
        self.dropout = dropout
        self.owns = owns

    def mix(self, h: Tensor, changes: list[Tensor]) -> Tensor:
        """Σ ω_n ⊙ u_n."""
        scales = F.dropout(self.scales, self.dropout, self.training).to(changes[0].dtype)
        total = scales[0] * changes[0]
        for scale, change in zip(scales[1:], changes[1:], strict=True):
            total = torch.addcmul(total, change, scale)
        return total

    def file_tensors(self) -> dict[str, Tensor]:
        """ω, once."""
        return {"scales": self.scales} if self.owns else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaLearn(OverAdapters):
    """h + Σ ω_n ⊙ u_n: trained scales of frozen adapters."""

    kind = "scalearn"
    paper = "Frohmann et al. 2023, arXiv:2310.01217"
    learning_rate: ClassVar[float] = 6e-3

    uniform: bool = False
    """One scale for each adapter instead of one for each of its features (ScaLearnUniform)."""
    shared: bool = False
    """The same scales at all places (ScaLearn++, ScaLearnUniform++)."""
    dropout: float | None = None
    """Probability of zeroing a scale, in training; None as the authors: 0.3, and 0 with both `uniform` and `shared`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rate("dropout")

    def over(self, site: Site, width: int) -> OverPiece:
        """Scales for one place."""
        dtype, count = trainable_dtype(site.dtype), len(self.adapters)
        scales = torch.empty(count, 1 if self.uniform else width, dtype=dtype, device=site.device)
        usual = 0.0 if self.uniform and self.shared else 0.3
        dropout = usual if self.dropout is None else self.dropout
        return ScalePiece(tuple(self.adapters), nn.Parameter(scales.normal_(2 / count, 0.001)), dropout, owns=True)

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        """A piece for each place; all with one ω where it is shared."""
        made = super().build(model, sites)
        if not self.shared:
            return made
        first = made[0][1]
        assert isinstance(first, ScalePiece)
        for site, piece in made[1:]:
            assert isinstance(piece, ScalePiece)
            if piece.scales.shape != first.scales.shape:
                raise UnsupportedError(
                    f"ScaLearn(shared=True): {site.name} has another width than {made[0][0].name}, so they cannot "
                    "share scales; use uniform=True, or leave it out with exclude=..."
                )
            piece.scales, piece.owns = first.scales, False
        return made
