"""FRoD: full-rank fine-tuning with rotational degrees of freedom (Wan et al. 2025, arXiv:2512.23485).

    W′ = U (S + diag(l)) Vᵀ,     W = U diag(l₀) Vᵀ

All weights of one kind, such as the queries of all layers, share the basis V (in, in); U (out, in) follows from W and
V, and both are frozen. l (in) is trained, and the entries of S at fixed random places off the diagonal, which turn the
directions of V into one another. S starts at zero and l at l₀, so the model starts as the base, to rounding.

In single precision U (S + diag(l)) Vᵀ x is computed in place of W x; where that would round too coarsely, in half
precision or for a V that is nearly singular, U (S + diag(l − l₀)) Vᵀ x is added to W x.

Parameters: in + sparse_rate · in². Frozen beside them: as many numbers as W has for each place, and in² for each kind.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.joint import Bases, FRoDPiece
from inlay.pieces.linear import named
from inlay.pieces.projections import Placed, Shared, SharingMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class FRoD(SharingMethod):
    """W′ = U (S + diag(l)) Vᵀ: scales and sparse turns within a basis that all weights of one kind share."""

    kind = "frod"
    default_targets = "query,value"
    peft_type = "FROD"
    paper = "Wan et al. 2025, arXiv:2512.23485"
    peft_constants = (("bias", "none"),)
    common = frozenset({"sparse_rate", "regularization_alpha", "seed", "save_projection"})

    sparse_rate: float = named("sparse_rate", 0.01)
    """Share of the entries off the diagonal that are trained."""
    regularization_alpha: float = named("regularization_alpha", 1e-3)
    """Ridge of the inverses from which V is made."""
    dropout: float = named("frod_dropout", 0.0)
    """Probability of zeroing an entry of the change's x, in training."""
    seed: int = named("projection_prng_key", 0)
    """What the places of S are drawn from."""
    save_projection: bool = named("save_projection", True)
    """Write V and the places of S into the file too; without them both are made again from the base and the seed."""

    def __post_init__(self) -> None:
        self.check_number("regularization_alpha")
        self.check_whole("seed", least=0)
        self.check_rate("dropout")
        if not isinstance(self.sparse_rate, int | float) or not 0 <= self.sparse_rate <= 1:
            raise ConfigError(f"FRoD(sparse_rate={self.sparse_rate!r}): a number from 0 to 1 is needed")

    def piece(self, site: Site) -> Piece:
        weight = site.module._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            stored = "quantised" if weight is not None else "parametrised"
            raise UnsupportedError(f"FRoD cannot sit at {site.name}: it factors W, and W is {stored}; use LoRA there")
        return FRoDPiece(self, site)

    def share(self, placed: Placed) -> Shared:
        bases = Bases(placed, self.sparse_rate, self.regularization_alpha, self.seed, self.save_projection)
        bases.place(placed, fresh=True)
        return bases

    def writes(self, name: str) -> bool:
        return self.save_projection

    def import_(self, pieces: Placed, tensors: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
        super().import_(pieces, tensors, extra)
        bases = pieces[0][1].shared
        assert isinstance(bases, Bases)
        bases.place(pieces, fresh=False)  # U belongs to the V of the file, not to one made anew
