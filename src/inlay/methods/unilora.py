"""Uni-LoRA: every entry of every A and B out of one vector (Li et al. 2025, arXiv:2506.00799).

    ΔW = B A,     A = θ'[I_A],     B = θ'[I_B],     θ'_k = θ_k / √(how often k occurs in all I)

θ (d) is trained; the indices I are drawn from a seed, each k as often as any other to within one. θ starts small and
random, so the model starts near the base, not as it.

Parameters: d for the whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.kernels.balanced import balanced
from inlay.pieces.linear import named
from inlay.pieces.projections import Placed, Shared, SharingMethod, SharingPiece, as_trained


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


class OneVector(Shared):
    """θ (d), trained, and by what its entries are scaled."""

    scale: Tensor

    def __init__(self, method: UniLoRA, placed: Placed) -> None:
        super().__init__()
        start, bound = torch.empty(method.theta_d_length), abs(method.init_theta_d_bound)
        self.unilora_theta_d = nn.Parameter(as_trained(placed, start.uniform_(-bound, bound)))
        self.register_buffer("scale", as_trained(placed, torch.zeros_like(start)), persistent=False)

    def root_tensors(self) -> dict[str, Tensor]:
        return {"unilora_theta_d": self.unilora_theta_d}


class UniLoRAPiece(SharingPiece):
    """The indices of A (r, in) and of B (out, r)."""

    shared: OneVector
    unilora_indices_A: Tensor
    unilora_indices_B: Tensor

    def __init__(self, method: UniLoRA, site: Site) -> None:
        super().__init__(method, site)
        self.saves, (out, width) = method.save_indices, self.shape
        for name, shape in (("unilora_indices_A", (method.r, width)), ("unilora_indices_B", (out, method.r))):
            index = torch.empty(shape, dtype=torch.int32, device=site.device)
            self.register_buffer(name, index, persistent=False)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        a, b = self.unilora_indices_A, self.unilora_indices_B
        theta = (self.shared.unilora_theta_d * self.shared.scale).to(a.device)
        return theta.index_select(0, a.flatten()).view(a.shape), theta.index_select(0, b.flatten()).view(b.shape), 1.0

    def file_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for letter, index in (("A", self.unilora_indices_A), ("B", self.unilora_indices_B)):
            if self.saves:
                scale = self.shared.scale.to(index.device)[index.long()]
                found |= {f"unilora_indices_{letter}": index.long(), f"unilora_scales_{letter}": scale}
        return found

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for letter, own in (("A", self.unilora_indices_A), ("B", self.unilora_indices_B)):
            if self.saves:
                index, scale = tensors[f"unilora_indices_{letter}"], self.shared.scale
                own.copy_(index)
                scale[index.to(scale.device)] = tensors[f"unilora_scales_{letter}"].to(scale)
