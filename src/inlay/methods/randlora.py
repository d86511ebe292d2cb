"""RandLoRA: full rank from random bases (Albert et al. 2025, arXiv:2502.00987).

    ΔW = s · Σ_j B_j Λ_j A Γ_j,     j = 1 … n,     n = ⌈min(in, out) / r⌉,     s = alpha / r

A (r, the smaller side) and B_j (the larger side, r) are random, frozen and the same for all places; the diagonals Λ_j
and Γ_j are trained. (Where out is the smaller side, ΔW is the transpose of this.) The sum has full rank, so it runs as
two factors of rank n r only while the rows of x are few, and is formed where they are many. Λ starts at zero, so the
model starts as the base. Which columns of B' = [B_1 … B_n] make up B_j is HF peft's choice: every n-th one.

Parameters: n · (r + min(in, out)).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.kernels import dense, random_bases
from inlay.pieces.linear import named
from inlay.pieces.projections import Placed, Shared, SharingMethod, SharingPiece, as_trained, widest


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoRA(SharingMethod):
    """ΔW = s · Σ_j B_j Λ_j A Γ_j: a change of full rank; of random matrices only the scales are trained."""

    kind = "randlora"
    default_targets = "query,value"
    peft_type = "RANDLORA"
    paper = "Albert et al. 2025, arXiv:2502.00987"
    peft_constants = (("bias", "none"),)
    common = frozenset({"r", "seed", "sparse", "very_sparse", "save_projection"})

    r: int = named("r", 32)
    """Rank of each basis; a lower one takes more of them, and more parameters."""
    alpha: float = named("randlora_alpha", 640)
    """Numerator of the scale s."""
    dropout: float = named("randlora_dropout", 0.0)
    """Probability of zeroing an entry of x, in training."""
    sparse: bool = named("sparse", False)
    """Bases of −1, 0 and 1, where two thirds are 0."""
    very_sparse: bool = named("very_sparse", False)
    """The same with one entry other than 0 in √(smaller side)."""
    seed: int = named("projection_prng_key", 0)
    """What A and B are drawn from."""
    save_projection: bool = named("save_projection", False)
    """Write A and B into the file too, as HF peft has it: once more for each place."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_whole("seed", least=0)
        self.check_number("alpha")
        self.check_rate("dropout")

    def piece(self, site: Site) -> Piece:
        return RandLoRAPiece(self, site)

    def share(self, placed: Placed) -> Shared:
        return RandomBases(self, placed)

    def writes(self, name: str) -> bool:
        return self.save_projection


class RandomBases(Shared):
    """A (r, 1, smaller side) and B (larger side, n, r), frozen, with a standard deviation of 1; drawn from a seed."""

    def __init__(self, method: RandLoRA, placed: Placed) -> None:
        super().__init__()
        small, large = sorted(widest(placed))
        one_in = math.sqrt(small) if method.very_sparse else 3 if method.sparse else None
        drawn = random_bases.drawn(method.r, small, large, method.seed, one_in)
        self.randlora_A: Tensor
        self.randlora_B: Tensor
        for name, basis in zip(("randlora_A", "randlora_B"), drawn, strict=True):
            self.register_buffer(name, as_trained(placed, basis), persistent=False)


class RandLoRAPiece(SharingPiece):
    """Λ (r, n) and Γ (n, smaller side), by HF peft's names."""

    shared: RandomBases

    def __init__(self, method: RandLoRA, site: Site) -> None:
        super().__init__(method, site)
        self.scale, self.saves = method.alpha / method.r, method.save_projection
        self.small, self.large = sorted(self.shape)
        self.bases = math.ceil(self.small / method.r)
        self.randlora_lambda = self.start(method.r, self.bases, value=0.0)
        self.randlora_gamma = self.start(self.bases, self.small, value=1 / max(self.bases, self.small))

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # As factors 5 T small² products beyond the base's, as a matrix T small² and 3 small³ (for a square one).
        if x.numel() * 4 > 3 * self.small * x.shape[-1] and not (self.dropout and self.training):
            return dense.changed(inner, x, self.form, self.formed_from())
        return super().forward(inner, x, *args, **kwargs)

    def formed_from(self) -> list[Tensor]:
        return [self.randlora_lambda, self.randlora_gamma]

    def form(self, *tensors: Tensor) -> Any:
        a, b, scale = self.bases_scaled_by(*tensors)
        return scale * (b @ a)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.bases_scaled_by(*self.formed_from())

    def bases_scaled_by(self, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor, float]:
        """A (n r, in), B (out, n r) and s, for Λ and Γ."""
        device = inner.device
        near = random_bases.scaled(self.shared.randlora_A[:, 0, : self.small].to(device), inner, outer)
        far = self.shared.randlora_B[: self.large, : self.bases].flatten(1).to(device)
        return (near, far, self.scale) if self.shape[1] == self.small else (far.t(), near.t(), self.scale)

    def file_tensors(self) -> dict[str, Tensor]:
        return {**super().file_tensors(), **(self.shared.root_tensors() if self.saves else {})}
