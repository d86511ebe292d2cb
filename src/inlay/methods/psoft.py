"""PSOFT: orthogonal fine-tuning in the weight's principal subspace (Wu et al. 2025, arXiv:2505.11235).

    W′ = W + B (diag(b) R diag(a) − I) A,     B A = U_r Σ_r V_rᵀ,     R = (I + Q)(I − Q)⁻¹,     Q = −Qᵀ  (r, r)

A and B are the r largest singular directions of W, frozen, and made anew from W when the adapter is loaded: files hold
R's numbers alone. Q starts at zero and the vectors at one, so the model starts as the base. It costs what a LoRA of
rank r does whose factors are frozen.

Parameters: r (r − 1) / 2 + 2 r.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.pieces.deltas.principal_part import PSOFTPiece
from inlay.pieces.linear import LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class PSOFT(LinearMethod):
    """W′ = W + B (diag(b) R diag(a) − I) A: the principal part of W, turned."""

    kind = "psoft"
    default_targets = "query,value"
    peft_type = "PSOFT"
    paper = "Wu et al. 2025, arXiv:2505.11235"
    peft_conv1d = False

    r: int = named("r", 32)
    """How many singular directions."""
    alpha: float = named("psoft_alpha", 32)
    """Divides B and multiplies what comes of it, r times: without effect but on the entries of A and B."""
    dropout: float = named("psoft_dropout", 0.0)
    """Probability of zeroing an entry of x before A, in training."""
    ab_svd_init: Literal["psoft_init", "pissa_init"] = named("ab_svd_init", "psoft_init")
    """Where Σ goes: whole into B, or its root into each; then R turns in another metric."""
    svd: Literal["full", "lowrank"] = named("psoft_svd", "full")
    """How the directions are found: all and exactly, or only r by random projection."""
    svd_lowrank_niter: int = named("psoft_svd_lowrank_niter", 10)
    """Power iterations of the random projection."""
    random_seed: int = named("random_seed", 0)
    """Seed of the random projection."""
    orth: bool = named("psoft_orth", True)
    """R orthogonal; otherwise any matrix."""
    mag_b: bool = named("psoft_mag_b", True)
    """Train b."""
    mag_a: bool = named("psoft_mag_a", True)
    """Train a."""
    use_cayley_neumann: bool = named("use_cayley_neumann", False)
    """R by the series I + 2 Q + 2 Q² + … cut short."""
    num_cayley_neumann_terms: int = named("num_cayley_neumann_terms", 5)
    """Where the series ends, as in OFT."""
    cayley_neumann_eps: float | None = named("cayley_neumann_eps", None)
    """The largest Frobenius norm of Q in the series; longer ones are scaled down."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_number("alpha")
        self.check_rate("dropout")
        if self.alpha < 0:
            raise ConfigError(f"PSOFT(alpha={self.alpha!r}): its root is taken, so a positive number is needed")
        self.check_choice("ab_svd_init", ("psoft_init", "pissa_init"))
        self.check_choice("svd", ("full", "lowrank"))
        self.check_whole("num_cayley_neumann_terms", least=2)

    def piece(self, site: Site) -> Piece:
        return PSOFTPiece(self, site)
