"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2023, arXiv:2310.11454).

    y = W x + b ⊙ B (d ⊙ A x),     ΔW = (b ⊙ B ⊙ dᵀ) A

A (r, in) and B (out, r) are random, frozen and the same for all places, which take the corner that fits; a place
trains two vectors. b starts at zero, so the model starts as the base.

Parameters: r + out.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.pieces.linear import named
from inlay.pieces.projections import Placed, Projections, Shared, SharingMethod, SharingPiece, projected


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(SharingMethod):
    """y = W x + b ⊙ B (d ⊙ A x): two trained vectors a place around two random matrices that all places share."""

    kind = "vera"
    default_targets = "query,value"
    peft_type = "VERA"
    paper = "Kopiczko et al. 2023, arXiv:2310.11454"
    peft_constants: ClassVar[tuple[tuple[str, Any], ...]] = (("bias", "none"),)
    common = frozenset({"r", "seed", "save_projection"})

    r: int = named("r", 256)
    """Rank of the change. It costs one number a place, so that it is far higher than LoRA's."""
    d_initial: float = named("d_initial", 0.1)
    """Where d starts."""
    dropout: float = named("vera_dropout", 0.0)
    """Probability of zeroing an entry of x before A, in training."""
    seed: int = named("projection_prng_key", 0)
    """What A and B are drawn from."""
    save_projection: bool = named("save_projection", True)
    """Write A and B into the file too; without them it is tiny, and relies on the seed's giving the same again."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_whole("seed", least=0)
        self.check_number("d_initial")
        self.check_rate("dropout")

    def piece(self, site: Site) -> Piece:
        return VeRAPiece(self, site)

    def share(self, placed: Placed) -> Shared:
        return Projections("vera", placed, self.r, self.r, self.seed)

    def writes(self, name: str) -> bool:
        return self.save_projection


class VeRAPiece(SharingPiece):
    """The vectors b (out) and d (r), by HF peft's names."""

    shared: Projections

    def __init__(self, method: VeRA, site: Site) -> None:
        super().__init__(method, site)
        self.vera_lambda_b = self.start(self.shape[0], value=0.0)
        self.vera_lambda_d = self.start(method.r, value=method.d_initial)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        a, b = self.shared.corner(*self.shape, self.vera_lambda_b.device)
        rate = self.dropout if self.training else 0.0
        return projected(inner, x, a, b, lambda h: self.vera_lambda_d * h, self.vera_lambda_b, rate)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        a, b = self.shared.corner(*self.shape, self.vera_lambda_b.device)
        return a, b * torch.outer(self.vera_lambda_b, self.vera_lambda_d), 1.0
