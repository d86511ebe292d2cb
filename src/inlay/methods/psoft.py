"""PSOFT: orthogonal fine-tuning in the weight's principal subspace (Wu et al. 2025, arXiv:2505.11235).

    W′ = W + B (diag(b) R diag(a) − I) A,     B A = U_r Σ_r V_rᵀ,     R = (I + Q)(I − Q)⁻¹,     Q = −Qᵀ  (r, r)

A and B are the r largest singular directions of W, frozen, and made anew from W when the adapter is loaded: files hold
R's numbers alone. Q starts at zero and the vectors at one, so the model starts as the base. It costs what a LoRA of
rank r does whose factors are frozen.

Parameters: r (r − 1) / 2 + 2 r.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.kernels import rotations
from inlay.kernels.choice import compute_dtype, without_autocast
from inlay.kernels.lora import rows
from inlay.pieces.linear import DeltaPiece, LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class PSOFT(LinearMethod):
    """W′ = W + B (diag(b) R diag(a) − I) A: the principal part of W, turned."""

    kind = "psoft"
    default_targets = "query,value"
    peft_type = "PSOFT"
    paper = "Wu et al. 2025, arXiv:2505.11235"
    peft_conv1d = False

    r: int = named("r", 32)
    """How many singular directions."""
    alpha: float = named("psoft_alpha", 32)
    """Divides B and multiplies what comes of it, r times: without effect but on the entries of A and B."""
    dropout: float = named("psoft_dropout", 0.0)
    """Probability of zeroing an entry of x before A, in training."""
    ab_svd_init: Literal["psoft_init", "pissa_init"] = named("ab_svd_init", "psoft_init")
    """Where Σ goes: whole into B, or its root into each; then R turns in another metric."""
    svd: Literal["full", "lowrank"] = named("psoft_svd", "full")
    """How the directions are found: all and exactly, or only r by random projection."""
    svd_lowrank_niter: int = named("psoft_svd_lowrank_niter", 10)
    """Power iterations of the random projection."""
    random_seed: int = named("random_seed", 0)
    """Seed of the random projection."""
    orth: bool = named("psoft_orth", True)
    """R orthogonal; otherwise any matrix."""
    mag_b: bool = named("psoft_mag_b", True)
    """Train b."""
    mag_a: bool = named("psoft_mag_a", True)
    """Train a."""
    use_cayley_neumann: bool = named("use_cayley_neumann", False)
    """R by the series I + 2 Q + 2 Q² + … cut short."""
    num_cayley_neumann_terms: int = named("num_cayley_neumann_terms", 5)
    """Where the series ends, as in OFT."""
    cayley_neumann_eps: float | None = named("cayley_neumann_eps", None)
    """The largest Frobenius norm of Q in the series; longer ones are scaled down."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_number("alpha")
        self.check_rate("dropout")
        if self.alpha < 0:
            raise ConfigError(f"PSOFT(alpha={self.alpha!r}): its root is taken, so a positive number is needed")
        self.check_choice("ab_svd_init", ("psoft_init", "pissa_init"))
        self.check_choice("svd", ("full", "lowrank"))
        self.check_whole("num_cayley_neumann_terms", least=2)

    def piece(self, site: Site) -> Piece:
        return PSOFTPiece(self, site)


class PSOFTPiece(DeltaPiece):
    """Q's entries or R itself, and the vectors: `psoft_R.weight`, `psoft_R.vector_a`, `psoft_R.vector_b`."""

    def __init__(self, method: PSOFT, site: Site) -> None:
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


def principal(method: PSOFT, site: Site) -> tuple[Tensor, Tensor, Tensor]:
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
