"""A weight's principal part, turned: its largest singular directions are frozen, a matrix between them is trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.kernels import rotations
from inlay.kernels.choice import compute_dtype, without_autocast
from inlay.kernels.lora import rows
from inlay.pieces.linear import DeltaPiece


class PSOFTPiece(DeltaPiece):
    """Q's entries or R itself, and the vectors: `psoft_R.weight`, `psoft_R.vector_a`, `psoft_R.vector_b`."""

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        r, self.scale, self.orth = method.r, method.alpha / method.r, method.orth
        self.terms = method.num_cayley_neumann_terms if method.use_cayley_neumann else 0
        self.eps = method.cayley_neumann_eps
        u, s, v = principal(method, site)
        left = s / self.scale if method.ab_svd_init == "psoft_init" else (s / self.scale).sqrt()
        right = torch.ones_like(s) if method.ab_svd_init == "psoft_init" else left
        self.a: Tensor
        self.b: Tensor
        self.register_buffer("a", (right[:, None] * v).to(self.place["dtype"]).contiguous(), persistent=False)
        self.register_buffer("b", (u * left).to(self.place["dtype"]).contiguous(), persistent=False)
        start = torch.zeros(r * (r - 1) // 2, **self.place) if method.orth else torch.eye(r, **self.place)
        vectors = {"vector_a": method.mag_a, "vector_b": method.mag_b}
        ones = {name: torch.ones(r, **self.place) for name, trained in vectors.items() if trained}
        self.psoft_R = nn.ParameterDict({"weight": start, **ones})

    def change(self) -> Tensor:
        """diag(b) R diag(a) − I, exactly zero where nothing turns."""
        weight: Tensor = self.psoft_R["weight"]
        one = torch.ones(len(self.a), dtype=weight.dtype, device=weight.device)
        both: Tensor = self.psoft_R.get("vector_b", one)[:, None] * self.psoft_R.get("vector_a", one)
        identity = torch.diag(one)
        if not self.orth:
            return both * weight - identity
        q = rotations.skew(weight[None], len(one))[0]
        if self.terms and self.eps is not None:
            q = q * (self.eps / q.norm().clamp_min(self.eps))
        return both * (rotations.neumann(q, self.terms) if self.terms else rotations.cayley(q)) + (both - 1) * identity

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y, dtype = inner(x), compute_dtype(x)
        a, b, rate = self.a.to(dtype), self.b.to(dtype), self.dropout if self.training else 0.0
        with without_autocast(x):  # in three steps, since A and B are frozen: then x need not be kept, but h (T, r)
            h = F.linear((F.dropout(x, rate) if rate else x).to(dtype), a)
            h = F.linear(h, (self.scale * self.change()).to(dtype))
            return torch.addmm(rows(y).to(dtype), rows(h), b.T).to(y.dtype).view(y.shape)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.change() @ self.a, self.b, self.scale


def principal(method: Any, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), Σ (r) and Vᵀ (r, in) of W, in fp32."""
    if not site.weight.is_floating_point():
        raise UnsupportedError(f"PSOFT cannot sit at {site.name}: it factors W, which is quantised; use LoRA there")
    if method.r > min(site.in_features, site.out_features):
        least = min(site.in_features, site.out_features)
        raise ConfigError(f"PSOFT at {site.name}: W has {least} singular directions, fewer than r={method.r}")
    weight = (site.weight.T if site.transposed else site.weight).detach().float()
    if method.svd == "full":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, : method.r], s[: method.r], v[: method.r]
    device = weight.device
    where = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**where):
        torch.manual_seed(method.random_seed)
        u, s, v = torch.svd_lowrank(weight, q=method.r, niter=method.svd_lowrank_niter)
    return u, s, v.T
