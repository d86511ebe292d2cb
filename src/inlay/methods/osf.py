"""OSF: orthogonal subspace fine-tuning (Nayak et al. 2025, arXiv:2504.07097).

    W′ = U_h S_h V_h + U S V,     W = U_h S_h V_h + U₀ S₀ V₀

The singular triplets of W with the largest values are frozen, which keeps what a model knows while it learns one task
after another; the others are trained, U, S and V, and the gradients of U and V lose their part in the frozen
directions. The model starts as the base. On a linear the change U S V − U₀ S₀ V₀ is never formed.

Parameters: (min(in, out) − effective_rank) (in + out + 1).
"""

from __future__ import annotations

import dataclasses

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.deltas.triplets import OSFPiece
from inlay.pieces.linear import LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class OSF(LinearMethod):
    """W′ = U_h S_h V_h + U S V: trains the singular triplets of small value, away from the directions of the large."""

    kind = "osf"
    hosts = frozenset({"linear", "conv"})
    default_targets = "all-linear"
    peft_type = "OSF"
    paper = "Nayak et al. 2025, arXiv:2504.07097"
    peft_conv1d = False

    effective_rank: int | float | None = named("effective_rank", None, "rank_pattern")
    """How many triplets are frozen: a number, a share of all of them (a float), or None for half."""

    def __post_init__(self) -> None:
        value = self.effective_rank
        share = isinstance(value, float) and 0 < value < 1
        if (
            value is not None
            and not share
            and (isinstance(value, bool | float) or not isinstance(value, int) or value < 1)
        ):
            raise ConfigError(
                f"OSF(effective_rank={value!r}): a whole number of at least 1 or a share below 1 is needed"
            )

    def piece(self, site: Site) -> Piece:
        weight = site.module._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            stored = "quantised" if weight is not None else "parametrised"
            raise UnsupportedError(f"OSF cannot sit at {site.name}: it factors W, and W is {stored}; use LoRA there")
        return OSFPiece(self, site)
