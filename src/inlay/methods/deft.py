"""DEFT: decompositional efficient fine-tuning (Kumar et al. 2025, arXiv:2509.22793), HF peft's DEFT.

    W′ = (I − Q Kᵀ) W + s · Q R,     s = alpha / r, or 1

Q Kᵀ takes a part of what W gives away, and Q R puts something else in its place. Q is P and K is relu(P), or both are
the orthonormal columns of P, so that Q Kᵀ is a projection. The change is Q (s R − Kᵀ W), of rank r: it runs as a LoRA
whose first factor is that difference. R starts as Kᵀ W / s, so the model starts as the base. With `para` nothing is put
back, and it does not. W is what lies inside: of two adapters the outer one takes away from what the inner one made.

The other DEFT, density-efficient fine-tuning, is a loss: `density`.

Parameters: r (in + out), with r at most out; r out with `para`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.pieces.deltas.suppressed import DEFTPiece
from inlay.pieces.linear import LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class DEFT(LinearMethod):
    """W′ = (I − Q Kᵀ) W + s · Q R: takes a subspace of the outputs away, and puts trained ones in its place."""

    kind = "deft"
    default_targets = "query,value"
    peft_type = "DEFT"
    paper = "Kumar et al. 2025, arXiv:2509.22793"
    peft_constants = (("bias", "none"),)

    r: int = named("r", 8)
    """Rank of what is taken away and of what is put in; at most the number of outputs."""
    alpha: float | None = named("alpha", None)
    """Numerator of the scale s; None: s is one."""
    decomposition_method: Literal["relu", "qr"] = named("decomposition_method", "relu")
    """What Q and K are: P and relu(P), or both the orthonormal columns of P."""
    para: bool = named("para", False)
    """Take away only, without R."""
    dropout: float = named("deft_dropout", 0.0)
    """Probability of zeroing an entry of x before R, in training."""
    init_weights: bool = named("init_weights", True)
    """Start R where the model is the base; otherwise at random, and part of W is gone from the start."""
    init_scale: float = named("init_scale", 1.0)
    """Scale of that random start: R has a standard deviation of 0.02 times this."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_rate("dropout")
        self.check_choice("decomposition_method", ("relu", "qr"))
        self.check_number("init_scale", *(("alpha",) if self.alpha is not None else ()))
        if self.init_scale < 0:
            raise ConfigError(f"DEFT(init_scale={self.init_scale!r}): a positive number is needed")

    def piece(self, site: Site) -> Piece:
        return DEFTPiece(self, site)
