"""Random bases that all places share, and the trained diagonals by which each place scales them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from inlay.engine.sites import Site
from inlay.kernels import dense, random_bases
from inlay.pieces.projections import Placed, Shared, SharingPiece, as_trained, widest


class RandomBases(Shared):
    """A (r, 1, smaller side) and B (larger side, n, r), frozen, with a standard deviation of 1; drawn from a seed."""

    def __init__(self, method: Any, placed: Placed) -> None:
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

    def __init__(self, method: Any, site: Site) -> None:
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
