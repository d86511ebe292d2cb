"""Uni-LoRA: every entry of every A and B out of one vector (Li et al. 2025, arXiv:2506.00799).

    ΔW = B A,     A = θ'[I_A],     B = θ'[I_B],     θ'_k = θ_k / √(how often k occurs in all I)

θ (d) is trained; the indices I are drawn from a seed, each k as often as any other to within one. θ starts small and
random, so the model starts near the base, not as it.

Parameters: d for the whole model.
"""

from __future__ import annotations

import dataclasses

import torch

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.kernels.balanced import balanced
from inlay.pieces.linear import named
from inlay.pieces.projections import Placed, Shared, SharingMethod
from inlay.pieces.sharing.one_vector import OneVector, UniLoRAPiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniLoRA(SharingMethod):
    """ΔW = B A, whose entries are all looked up in one trained vector."""

    kind = "unilora"
    default_targets = "query,value"
    peft_type = "UNILORA"
    paper = "Li et al. 2025, arXiv:2506.00799"
    peft_constants = (("bias", "none"),)
    common = frozenset({"theta_d_length", "init_theta_d_bound", "seed", "save_indices"})

    r: int = named("r", 4)
    """Rank of the change."""
    theta_d_length: int = named("theta_d_length", 256)
    """Entries of θ, all that is trained."""
    dropout: float = named("unilora_dropout", 0.0)
    """Probability of zeroing an entry of x before A, in training."""
    init_theta_d_bound: float = named("init_theta_d_bound", 0.02)
    """θ starts uniformly in ± this."""
    seed: int = named("proj_seed", 42)
    """What the indices are drawn from."""
    save_indices: bool = named("save_indices", False)
    """Write the indices into the file too, and not rely on the seed's giving the same again."""

    def __post_init__(self) -> None:
        self.check_whole("r", "theta_d_length")
        self.check_whole("seed", least=0)
        self.check_number("init_theta_d_bound")
        self.check_rate("dropout")

    def piece(self, site: Site) -> Piece:
        return UniLoRAPiece(self, site)

    def share(self, placed: Placed) -> Shared:
        shared = OneVector(self, placed)
        empty = [index for _, piece in placed for index in piece.buffers()]
        drawn = balanced(sum(index.numel() for index in empty), self.theta_d_length, self.seed)
        counts = torch.bincount(drawn, minlength=self.theta_d_length).float()
        shared.scale.copy_(torch.where(counts > 0, counts.rsqrt(), 0.0))
        for index, values in zip(empty, drawn.split([index.numel() for index in empty]), strict=True):  # type: ignore[no-untyped-call]
            index.copy_(values.view(index.shape))
        return shared
