"""IncreLoRA: ranks that are added in training, where they matter (Zhang et al. 2023, arXiv:2308.12043).

    ΔW = s · B (A ⊙ E),     s = alpha / target_r,      E (r) the singular values, zero at the start

    importance    of a place: I = Ī · Ū of Σ |ΔW ⊙ ∂L/∂ΔW| / √(in out), averaged as in AdaLoRA
    growth        in each round the top_h places get grow_by ranks, until there are exactly target_r times the places
    reserve       the ranks that a place gets next: A and B learn already, E is 1e-5
    extra loss    γ · mean over all A and B of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖

The authors' code divides alpha by the rank that a place has just then, so that what was learnt shrinks whenever a place
grows (`compat="authors"`); and it overshoots the target where a round does not divide it, which is not done here.

Parameters: r (in + out + 1) for each place, of its rank r: init_r at the start, target_r at the end on average.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from inlay.engine.controller import Controller
from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import CheckpointError, ConfigError
from inlay.pieces.linear import LinearMethod
from inlay.pieces.lora.growing import GrowingLoRAPiece
from inlay.pieces.lora.rank_growth import RankGrowth


@dataclasses.dataclass(frozen=True, kw_only=True)
class IncreLoRA(LinearMethod):
    """ΔW = s · B (A ⊙ E), from init_r ranks at each place up to target_r on average."""

    kind = "increlora"
    paper = "Zhang et al. 2023, arXiv:2308.12043"

    init_r: int = 1
    """Ranks at each place at the start."""
    target_r: int = 2
    """Ranks at each place at the end, on average."""
    alpha: float = 32
    """Numerator of the scale s."""
    dropout: float = 0.0
    """Probability of zeroing an entry of x before A, in training."""
    top_h: int = 5
    """Places that grow in each round."""
    grow_by: int | None = None
    """Ranks that each of them gets; None: half of target_r."""
    warmup: int | None = None
    """Optimiser steps before the first round can come; None: a twentieth of the run."""
    interval: int | None = None
    """Optimiser steps from round to round; None: so many that the last comes in the middle of the run."""
    new_warmup: int | None = None
    """Optimiser steps in which the learning rate of new numbers rises to that of the old; None: as the interval."""
    beta1: float = 0.85
    """How much of the average importance is kept at each step."""
    beta2: float = 0.85
    """How much of the average uncertainty is kept at each step."""
    orthogonality: float = 0.1
    """Weight γ of the extra loss."""
    compat: str | None = None
    """"authors": alpha is divided by the place's rank at the time, and ΔW jumps when it grows."""

    def __post_init__(self) -> None:
        self.check_whole("init_r", "target_r", "top_h")
        self.check_whole(*(name for name in ("grow_by", "interval") if getattr(self, name) is not None))
        self.check_whole(*(n for n in ("warmup", "new_warmup") if getattr(self, n) is not None), least=0)
        self.check_number("alpha")
        self.check_rate("dropout", "beta1", "beta2")
        self.check_choice("compat", (None, "authors"))
        if self.target_r < self.init_r:
            raise ConfigError(f"IncreLoRA(target_r={self.target_r}, init_r={self.init_r}): the rank can only grow")

    @property
    def added(self) -> int:
        """Ranks that a place gets in a round."""
        return max(1, self.target_r // 2) if self.grow_by is None else self.grow_by

    def piece(self, site: Site) -> Piece:
        return GrowingLoRAPiece(self, site, self.init_r, self.alpha, None if self.compat else self.target_r)

    def controller(self, pieces: Mapping[str, Piece]) -> Controller:
        return RankGrowth(self, [piece for piece in pieces.values() if isinstance(piece, GrowingLoRAPiece)])

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        for site, piece in pieces:
            assert isinstance(piece, GrowingLoRAPiece)
            sizes, a = (tensors.get(self.file_key(site, name)) for name in ("lora_sizes", "lora_A"))
            if sizes is not None and a is not None:
                counts = sizes.flatten().tolist()
                if min(counts[:-1], default=0) < 1 or counts[-1] < 0 or sum(counts) != len(a):
                    raise CheckpointError(f"the file says {counts} ranks for {site.name}, and has {len(a)} rows of A")
                piece.resize(counts)
        super().import_(pieces, tensors, extra)
