"""TinyLoRA: a handful of numbers for a whole model (Morris et al. 2026, arXiv:2602.04118).

    ΔW = B (Σ_i v_i P_i) A,     U S Vᵀ ≈ W,     A = √S Vᵀ (r, in),     B = U √S (out, r)

A and B come from the r largest singular values of W, the P_i (r, r) are random; both are frozen. Only v (u) is trained,
and `weight_tying` lets several places share one. v starts at zero, so the model starts as the base.

Parameters: u for each group of places that share v.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.checkpoint import LOADING
from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels.choice import without_autocast
from inlay.pieces.linear import named
from inlay.pieces.projections import Placed, Shared, SharingMethod, SharingPiece, as_trained, projected


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyLoRA(SharingMethod):
    """ΔW = B (Σ_i v_i P_i) A: u trained numbers between frozen factors of W, for one place or for all."""

    kind = "tinylora"
    default_targets = "query,value"
    peft_type = "TINYLORA"
    paper = "Morris et al. 2026, arXiv:2602.04118"
    peft_constants = (("bias", "none"),)
    common = frozenset({"u", "weight_tying", "seed", "save_projection"})

    r: int = named("r", 2)
    """How many singular values of W the change lies in."""
    u: int = named("u", 64)
    """Entries of v."""
    weight_tying: float = named("weight_tying", 0.0)
    """How far places share v: at 0 each has its own, at 1 all have one, between them neighbours share."""
    dropout: float = named("tinylora_dropout", 0.0)
    """Probability of zeroing an entry of x before A, in training."""
    seed: int = named("projection_seed", 42)
    """What the P_i of the first place are drawn from; the next one's from seed + 1, and so on."""
    save_projection: bool = named("save_projection", True)
    """Write the P_i into the file too, and not rely on the seed's giving the same again."""

    def __post_init__(self) -> None:
        self.check_whole("r", "u")
        self.check_whole("seed", least=0)
        self.check_rate("dropout")
        if not isinstance(self.weight_tying, int | float) or not 0 <= self.weight_tying <= 1:
            raise ConfigError(f"TinyLoRA(weight_tying={self.weight_tying!r}): a number from 0 to 1 is needed")

    def piece(self, site: Site) -> Piece:
        return TinyLoRAPiece(self, site)

    def share(self, placed: Placed) -> Shared:
        groups = max(1, round(len(placed) * (1 - self.weight_tying)))
        for number, (_, piece) in enumerate(placed):
            assert isinstance(piece, TinyLoRAPiece)
            piece.group = min(number // (len(placed) // groups), groups - 1)
            piece.draw(self.seed + number)
        return Vectors(groups, self.u, placed)


class Vectors(Shared):
    """One v (u) for each group."""

    def __init__(self, groups: int, u: int, placed: Placed) -> None:
        super().__init__()
        zeros = as_trained(placed, torch.zeros(groups, u))
        self.tinylora_v = nn.ParameterList(nn.Parameter(row.clone()) for row in zeros)


class TinyLoRAPiece(SharingPiece):
    """A, B and P (u, r, r), frozen, by HF peft's names."""

    shared: Vectors
    tinylora_A: Tensor
    tinylora_B: Tensor
    tinylora_P: Tensor

    def __init__(self, method: TinyLoRA, site: Site) -> None:
        super().__init__(method, site)
        self.saves, self.group, r = method.save_projection, 0, min(method.r, *self.shape)
        for name, value in zip(("tinylora_A", "tinylora_B"), singular_factors(site, r), strict=True):
            self.register_buffer(name, value.to(self.place["dtype"]))
        self.register_buffer("tinylora_P", torch.empty(method.u, r, r, **self.place), persistent=False)

    def draw(self, seed: int) -> None:
        """P anew, with entries from N(0, 1 / r)."""
        generator, (u, r, _) = torch.Generator().manual_seed(seed), self.tinylora_P.shape
        drawn = torch.normal(0.0, 1 / r**0.5, (u, r, r), generator=generator, dtype=torch.float32)
        self.tinylora_P.copy_(drawn)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        core, rate = self.core(), self.dropout if self.training else 0.0
        a, b = self.tinylora_A, self.tinylora_B
        return projected(inner, x, a, b, lambda h: F.linear(h, core.to(h.dtype)), None, rate)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.tinylora_A, self.tinylora_B @ self.core(), 1.0

    def core(self) -> Tensor:
        """Σ_i v_i P_i (r, r)."""
        u, r, _ = self.tinylora_P.shape
        v = self.shared.tinylora_v[self.group].to(self.tinylora_P.device)
        with without_autocast(v):
            core: Tensor = (v @ self.tinylora_P.view(u, r * r)).view(r, r)
        return core

    def file_tensors(self) -> dict[str, Tensor]:
        names = ("tinylora_A", "tinylora_B", "tinylora_P")[: 3 if self.saves else 2]
        return {name: self.get_buffer(name) for name in names}


@torch.no_grad()
def singular_factors(site: Site, r: int) -> tuple[Tensor, Tensor]:
    """√S Vᵀ (r, in) and U √S (out, r) of the r largest singular values of W."""
    weight = site.weight.detach().float()
    if LOADING.get():  # a file is about to fill them
        return weight.new_empty(r, site.in_features), weight.new_empty(site.out_features, r)
    u, s, v = torch.linalg.svd(weight.T if site.transposed else weight, full_matrices=False)
    root = s[:r].sqrt()
    return (root[:, None] * v[:r]).contiguous(), (u[:, :r] * root).contiguous()
