"""Few trained numbers, shared by groups of places, which weigh random cores between a weight's singular factors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.checkpoint import LOADING
from inlay.engine.sites import Site
from inlay.kernels import low_rank
from inlay.kernels.choice import without_autocast
from inlay.pieces.lora.piece import refuse_other_lookups
from inlay.pieces.projections import Placed, Shared, SharingPiece, as_trained, projected


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

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        refuse_other_lookups(site, "TinyLoRA")
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
        if self.kind == "embedding":
            y = inner(x, *args, **kwargs)
            rows = F.dropout(F.embedding(x, b), rate) if rate else F.embedding(x, b)
            return y + low_rank.scaled_rows(F.linear(rows, (core @ a).T), inner.module).to(y.dtype)
        return projected(inner, x, a, b, lambda h: F.linear(h, core.to(h.dtype)), None, rate)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        a, b = self.tinylora_A, self.tinylora_B @ self.core()
        return (b.T, a.T, 1.0) if self.kind == "embedding" else (a, b, 1.0)  # of tables, as LoRA has them

    def delta(self) -> Tensor:
        return self.tinylora_B @ self.core() @ self.tinylora_A

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
    """√S Vᵀ (r, in) and U √S (out, r) of the r largest singular values of W; a table is (out, in) as it is."""
    weight = site.weight.detach().float()
    if LOADING.get():  # a file is about to fill them
        sizes = weight.shape if site.kind == "embedding" else (site.out_features, site.in_features)
        return weight.new_empty(r, sizes[1]), weight.new_empty(sizes[0], r)
    u, s, v = torch.linalg.svd(weight.T if site.transposed else weight, full_matrices=False)
    root = s[:r].sqrt()
    return (root[:, None] * v[:r]).contiguous(), (u[:, :r] * root).contiguous()
