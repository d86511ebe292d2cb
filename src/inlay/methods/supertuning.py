"""Super-Tuning: the entries of W of largest magnitude are trained, the others not (2026, arXiv:2607.09287).

    W′ = W + S (+ s · B A),     S nonzero where |W| is largest,     s = alpha / r

With a rank the paper calls it Supra: a LoRA is added. S and B start at zero, so the model starts as the base. The
places are chosen when the adapter is made, and kept in the file.

Parameters: (1 − sparsity) in · out, and r (in + out) with a rank.
"""

from __future__ import annotations

import dataclasses

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.pieces.linear import LinearMethod, named
from inlay.pieces.subsets.largest_entries import SupertuningPiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supertuning(LinearMethod):
    """W + S with S sparse, where |W| is largest (or smallest); with a rank, a LoRA beside it."""

    kind = "supertuning"
    default_targets = "query,value"
    peft_type = "SUPERTUNING"
    paper = "arXiv:2607.09287 (2026)"
    peft_constants = (("save_precomputed_indices", True),)
    peft_conv1d = False

    sparsity: float = named("sparsity", 0.99)
    """The share of the entries that is not trained."""
    select_top: bool = named("select_top", True)
    """Whether the largest entries are trained, or the smallest."""
    r: int | None = named("r", None)
    """Rank of a LoRA beside S; None: no LoRA."""
    alpha: float | None = named("lora_alpha", None)
    """Numerator of its scale s; None: 2 r."""
    dropout: float = named("lora_dropout", 0.0)
    """Probability of dropping an entry of the LoRA's input."""

    def __post_init__(self) -> None:
        self.check_rate("sparsity", "dropout")
        if self.r is not None:
            self.check_whole("r")
        if self.alpha is not None:
            self.check_number("alpha")
            if self.r is None:
                raise ConfigError(f"Supertuning(alpha={self.alpha!r}): alpha belongs to a LoRA, which needs a rank r")

    def piece(self, site: Site) -> Piece:
        return SupertuningPiece(self, site)
