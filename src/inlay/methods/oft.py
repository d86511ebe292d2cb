"""OFT: orthogonal fine-tuning (Qiu et al. 2023, arXiv:2306.07280), on the input and with a series (OFTv2, 2506.19847).

    y = W R x + b,     R = diag(R_1, …, R_n),     R_iᵀ = (I + Q_i)(I − Q_i)⁻¹ = I + 2 Q_i + 2 Q_i² + …,     Q_i = −Q_iᵀ

Each block of b entries of x is rotated, b² multiplications for each. The exact form (`use_cayley_neumann=False`) has
the opposite sign of Q, as HF peft has it. Q starts at zero, so the model starts as the base.

On an embedding the rows that are looked up are rotated: y = R Eᵀ x.

Parameters: in (b − 1) / 2, or b (b − 1) / 2 with `block_share`; an embedding counts its width as in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from inlay.engine.controller import Controller
from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.pieces.linear import LinearMethod, named
from inlay.pieces.multiplicative.block_rotation import OFTPiece, Projection


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFT(LinearMethod):
    """y = W R x + b with R block-diagonal and orthogonal."""

    kind = "oft"
    hosts = frozenset({"linear", "conv", "embedding"})
    default_targets = "query,value"
    peft_type = "OFT"
    paper = "Qiu et al. 2023, arXiv:2306.07280"
    peft_constants = (("module_dropout", 0.0), ("bias", "none"))
    peft_conv1d = False

    block_size: int = named("oft_block_size", 32)
    """Entries that are rotated together; where it does not divide in, the nearest divisor. 0: see `r`."""
    r: int = named("r", 0)
    """The number of blocks, with `block_size=0`; where it does not divide in, the nearest divisor."""
    coft: bool = named("coft", False)
    """Constrain each Q_i to a norm of at most eps / √n (COFT)."""
    eps: float = named("eps", 6e-5)
    """COFT's bound."""
    block_share: bool = named("block_share", False)
    """One rotation for all blocks."""
    use_cayley_neumann: bool = named("use_cayley_neumann", True)
    """The series cut short: no system of equations to solve, and R orthogonal for small Q only."""
    num_cayley_neumann_terms: int = named("num_cayley_neumann_terms", 5)
    """Where the series ends: 5 is I + 2 Q + 2 Q² + 2 Q³ + Q⁴."""

    def __post_init__(self) -> None:
        self.check_whole("block_size", "r", least=0)
        self.check_whole("num_cayley_neumann_terms", least=2)
        self.check_number("eps")
        if (self.r == 0) == (self.block_size == 0):
            raise ConfigError(f"OFT(r={self.r}, block_size={self.block_size}): set one of them, and the other to 0")

    def piece(self, site: Site) -> Piece:
        return OFTPiece(self, site)

    def controller(self, pieces: Mapping[str, Piece]) -> Controller | None:
        return Projection(pieces) if self.coft else None
