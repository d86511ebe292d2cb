"""AdaLoRA: a rank budget that shrinks in training and goes where it matters (Zhang et al. 2023, arXiv:2303.10512).

    ΔW = s · B (A ⊙ E),     s = alpha / init_r,      E (r) the singular values, zero at the start

    extra loss    γ · mean over all A and B of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖
    score         of a triplet: I(E_i) + mean_j I(A_ij) + mean_j I(B_ji),    I = Ī · Ū, moving averages of |p ∂p| and of
                  how far it strays from its average
    budget        all until tinit; then b_T + (b_0 − b_T) (1 − progress)³; exactly b_T in the last tfinal steps

Every delta_t steps the E of all but the best b(t) triplets of the whole model is set to zero; such a triplet may come
back until the last tfinal steps. Where several score alike the first stay, so that the budget is met exactly, which a
threshold misses.

Parameters: init_r (in + out + 1) for each place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.engine.controller import Controller
from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.linear import DeltaPiece, LinearMethod, named
from inlay.pieces.lora.rank_budget import RankBudget


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(LinearMethod):
    """ΔW = s · B (A ⊙ E), from init_r triplets at each place down to target_r on average."""

    kind = "adalora"
    hosts = frozenset({"linear", "conv"})
    peft_type = "ADALORA"
    paper = "Zhang et al. 2023, arXiv:2303.10512"
    peft_constants = (("bias", "none"),)
    peft_convolutions = frozenset({2})

    init_r: int = named("init_r", 12)
    """Triplets at each place at the start."""
    target_r: int = named("target_r", 8)
    """Triplets at each place at the end, on average."""
    alpha: float = named("lora_alpha", 8)
    """Numerator of the scale s."""
    dropout: float = named("lora_dropout", 0.0)
    """Probability of zeroing an entry of x before A, in training."""
    tinit: int = named("tinit", 0)
    """Optimiser steps before the budget begins to shrink."""
    tfinal: int = named("tfinal", 0)
    """Optimiser steps at the end in which the triplets that are left are trained."""
    delta_t: int = named("deltaT", 1)
    """Optimiser steps between two allocations."""
    beta1: float = named("beta1", 0.85)
    """How much of the average sensitivity is kept at each step."""
    beta2: float = named("beta2", 0.85)
    """How much of the average uncertainty is kept at each step."""
    orthogonality: float = named("orth_reg_weight", 0.5)
    """Weight γ of the extra loss."""

    def __post_init__(self) -> None:
        self.check_whole("init_r", "target_r", "delta_t")
        self.check_whole("tinit", "tfinal", least=0)
        self.check_number("alpha")
        self.check_rate("dropout", "beta1", "beta2")
        if self.target_r > self.init_r:
            raise ConfigError(f"AdaLoRA(target_r={self.target_r}, init_r={self.init_r}): the rank can only shrink")

    def piece(self, site: Site) -> Piece:
        return AdaLoRAPiece(self, site)

    def controller(self, pieces: Mapping[str, Piece]) -> Controller:
        return RankBudget(self, [piece for piece in pieces.values() if isinstance(piece, AdaLoRAPiece)])

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        if any(getattr(site.module, "groups", 1) > 1 for site in sites):
            raise UnsupportedError("HF peft has no AdaLoRA for grouped convolutions")
        return {**super().to_peft(sites, index), "total_step": self.tinit + self.tfinal + 1}

    def peft_state(self, pieces: Sequence[tuple[Site, Piece]]) -> dict[str, Any]:
        # Of places that came from a file with fewer triplets; which ones of init_r they once were does not matter.
        ranks = {site.path: len(piece.get_parameter("lora_E")) for site, piece in pieces}
        pattern = {f"{path}.lora_E": [n < rank for n in range(self.init_r)] for path, rank in ranks.items()}
        return {"rank_pattern": pattern if min(ranks.values()) < self.init_r else None}

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        for site, piece in pieces:
            assert isinstance(piece, AdaLoRAPiece)
            values = tensors.get(self.file_key(site, "lora_E"))
            piece.resize(len(values) if values is not None else self.init_r)
        super().import_(pieces, tensors, extra)


class AdaLoRAPiece(DeltaPiece):
    """A (r, in), B (out, r) and E (r, 1); `kept` says which triplets the last allocation left."""

    kept: Tensor | None

    def __init__(self, method: AdaLoRA, site: Site) -> None:
        super().__init__(method, site)
        self.scale = method.alpha / (method.init_r + 1e-5)  # the small number is the authors', and in their files
        self.resize(method.init_r)
        with torch.no_grad():
            self.lora_A.normal_(std=0.02)
            self.lora_B.normal_(std=0.02)

    def resize(self, r: int) -> None:
        """Make room for r triplets, all kept."""
        self.lora_A, self.lora_B = self.start(r, self.shape[1], value=0.0), self.start(self.shape[0], r, value=0.0)
        self.lora_E = self.start(r, 1, value=0.0)
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool, device=self.lora_E.device), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A * self.lora_E, self.lora_B, self.scale

    @torch.no_grad()
    def keep(self, chosen: Tensor) -> None:
        """Set the E of all other triplets to zero."""
        assert self.kept is not None
        self.kept.copy_(chosen)
        self.lora_E.masked_fill_(~self.kept[:, None], 0.0)
