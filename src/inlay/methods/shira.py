"""SHiRA: sparse high-rank adapter (Bhardwaj et al. 2024, arXiv:2406.13175).

    W′ = W + S,     S nonzero at r (in + out) fixed places only

As many numbers as a LoRA of rank r has, each of them added to one entry of W, at places drawn once at random: a change
of high rank to a few percent of the weight, so that adapters are swapped quickly and seldom collide when added. S
starts at zero, so the model starts as the base. The places are kept in the file.

Parameters: r (in + out).
"""

from __future__ import annotations

import dataclasses

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels import positions
from inlay.pieces.linear import LinearMethod, named
from inlay.pieces.subsets.sparse import SparseLinear


@dataclasses.dataclass(frozen=True, kw_only=True)
class SHiRA(LinearMethod):
    """W + S with S sparse, at fixed random places: as many numbers as a LoRA of rank r, but of high rank."""

    kind = "shira"
    default_targets = "query,value"
    peft_type = "SHIRA"
    paper = "Bhardwaj et al. 2024, arXiv:2406.13175"
    peft_constants = (("mask_type", "random"),)
    peft_conv1d = False

    r: int = named("r", 32)
    """Sets the number of places, r (in + out); the rank of the change is not bounded by it."""
    random_seed: int | None = named("random_seed", None)
    """Seed of the places, the same for each weight of one shape; None: drawn anew for each weight."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        if self.random_seed is not None:
            self.check_whole("random_seed", least=0)

    def piece(self, site: Site) -> Piece:
        return SHiRAPiece(self, site)


class SHiRAPiece(SparseLinear):
    """r (in + out) entries at random places."""

    def __init__(self, method: SHiRA, site: Site) -> None:
        o, i = site.out_features, site.in_features
        count = method.r * (o + i)
        if count > o * i:
            raise ConfigError(
                f"SHiRA(r={method.r}): {site.name} has {o * i} entries, fewer than r (in + out) = {count}"
            )
        super().__init__(method, site, positions.drawn(count, o * i, method.random_seed).sort().values)
