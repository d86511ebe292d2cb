"""PVeRA: VeRA with a distribution in its middle (Fillioux et al. 2025, arXiv:2512.07703).

    y = W x + b ⊙ B (μ + ε ⊙ exp(v / 2)),     [μ ; v] = d ⊙ A x,     ε ~ N(0, 1)

A has 2 r rows here: the first r give the mean, the others the logarithm of the variance. In training ε is drawn anew at
each call; otherwise z = μ, which is a VeRA and merges as one. b starts at zero, so the model starts as the base.

Parameters: 2 r + out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.methods.vera import VeRA
from inlay.pieces.linear import named
from inlay.pieces.projections import Placed, Projections, Shared, SharingPiece, projected


@dataclasses.dataclass(frozen=True, kw_only=True)
class PVeRA(VeRA):
    """y = W x + b ⊙ B z, where z is drawn around a mean; both the mean and its spread are made of d ⊙ A x."""

    kind = "pvera"
    peft_type = "PVERA"
    paper = "Fillioux et al. 2025, arXiv:2512.07703"
    peft_constants = (("bias", "none"), ("generator_seed", None))

    dropout: float = named("pvera_dropout", 0.0)
    """Probability of zeroing an entry of x before A, in training."""
    sample: Literal["training", "always", "never"] = "training"
    """When z is drawn and not the mean: in training, at inference too (then it does not merge), or never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("sample", ("training", "always", "never"))

    def piece(self, site: Site) -> Piece:
        return PVeRAPiece(self, site)

    def share(self, placed: Placed) -> Shared:
        return Projections("pvera", placed, 2 * self.r, self.r, self.seed)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        return {**super().to_peft(sites, index), "sample_at_inference": self.sample == "always"}

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        always = {"sample": "always"} if config.get("sample_at_inference") else {}
        return {**super().fields_from_peft(config), **always}


class PVeRAPiece(SharingPiece):
    """The vectors b (out) and d (2 r), by HF peft's names."""

    shared: Projections

    def __init__(self, method: PVeRA, site: Site) -> None:
        super().__init__(method, site)
        self.r, self.sample = method.r, method.sample
        self.pvera_lambda_b = self.start(self.shape[0], value=0.0)
        self.pvera_lambda_d = self.start(2 * method.r, value=method.d_initial)

    @property
    def mergeable(self) -> bool:
        """A weight has no noise of its own."""
        return self.sample != "always"

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        a, b = self.shared.corner(*self.shape, self.pvera_lambda_b.device)
        rate, latent = self.dropout if self.training else 0.0, self.drawn
        if self.sample == "never" or (self.sample == "training" and not self.training):
            a, latent = a[: self.r], self.mean
        return projected(inner, x, a, b, latent, self.pvera_lambda_b, rate)

    def mean(self, h: Tensor) -> Tensor:
        """μ for the first half of A x."""
        return self.pvera_lambda_d[: self.r] * h

    def drawn(self, h: Tensor) -> Tensor:
        """μ + ε ⊙ exp(v / 2) for A x."""
        mean, log_variance = (self.pvera_lambda_d * h).chunk(2, dim=-1)
        return torch.addcmul(mean, torch.randn_like(mean), torch.exp(0.5 * log_variance))

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        if not self.mergeable:
            return None
        a, b = self.shared.corner(*self.shape, self.pvera_lambda_b.device)
        return a[: self.r], b * torch.outer(self.pvera_lambda_b, self.pvera_lambda_d[: self.r]), 1.0
