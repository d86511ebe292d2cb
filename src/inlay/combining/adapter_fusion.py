"""AdapterFusion (Pfeiffer et al. 2020, arXiv:2005.00247): attention over the outputs of several frozen adapters.

    a = softmax_n((W_q h)·(W_k u_n))        h + W_v Σ_n a_n u_n        W_q, W_k, W_v (d, d) at each place

h is what the place gives, u_n what adapter n adds to it. W_v starts as the identity (plus N(0, 10⁻¹²) off its diagonal,
as in the paper) and is drawn to it by 0.01 ‖I − W_v‖²; so the start is near the adapters' mean, with weights that
already depend on h. Only (W_kᵀ W_q) h and W_v of the mean are formed, not W_k u_n and W_v u_n for each adapter.

`compat="authors"`: biases on W_q and W_k (that of W_k has no effect: it moves all scores alike), and 10⁻⁶ exactly off
the diagonal of W_v. Parameters: 3 d² for each place (authors: 3 d² + 2 d). BERT-base: 21,233,664 (21,252,096).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.combining.over_adapters import OverAdapters, OverPiece
from inlay.engine.controller import Controller
from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import ConfigError


class FusionPiece(OverPiece):
    """Attention over the adapters at one place."""

    def __init__(self, method: AdapterFusion, site: Site, width: int) -> None:
        super().__init__(tuple(method.adapters))
        place: dict[str, Any] = {"dtype": trainable_dtype(site.dtype), "device": site.device}
        biases = method.compat == "authors"
        self.query = nn.Linear(width, width, bias=biases, **place)
        self.key = nn.Linear(width, width, bias=biases, **place)
        self.value = nn.Linear(width, width, bias=False, **place)
        with torch.no_grad():
            for linear in (self.query, self.key):
                linear.weight.normal_(std=0.02)
                if biases:
                    linear.bias.zero_()
            self.value.weight.fill_(1e-6) if biases else self.value.weight.normal_(std=1e-6)
            self.value.weight.fill_diagonal_(1.0)

    def mix(self, h: Tensor, changes: list[Tensor]) -> Tensor:
        """W_v Σ a_n u_n."""
        u = torch.stack(changes, -2)  # (…, N, d)
        weights = self.attention(h.to(u.dtype), u).to(u.dtype)
        return F.linear((weights[..., None, :] @ u)[..., 0, :], self.value.weight.to(u.dtype))

    def attention(self, h: Tensor, u: Tensor) -> Tensor:
        """a (…, N), from h (…, d) and u (…, N, d)."""
        bias = self.query.bias if self.query.bias is None else self.query.bias.to(h.dtype)
        q = F.linear(h, self.query.weight.to(h.dtype), bias)
        scores = (u @ (q @ self.key.weight.to(h.dtype))[..., None])[..., 0]
        if self.key.bias is not None:
            scores = scores + (q @ self.key.bias.to(h.dtype))[..., None]
        return scores.float().softmax(-1) if scores.dtype != torch.float64 else scores.softmax(-1)


class NearIdentity(Controller):
    """λ Σ ‖I − W_v‖², over all places."""

    def __init__(self, strength: float, pieces: Sequence[Piece]) -> None:
        self.strength = strength
        self.pieces = [piece for piece in pieces if isinstance(piece, FusionPiece)]

    def extra_loss(self) -> Tensor | None:
        """The term for the task's loss."""
        values = [piece.value.weight for piece in self.pieces]
        parts = [(value - torch.eye(len(value), dtype=value.dtype, device=value.device)).square() for value in values]
        return self.strength * torch.stack([part.sum().to(parts[0].device) for part in parts]).sum()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFusion(OverAdapters):
    """h + W_v Σ a_n u_n, a = softmax((W_q h)·(W_k u_n)): attention over frozen adapters."""

    kind = "adapter_fusion"
    paper = "Pfeiffer et al. 2020, arXiv:2005.00247"
    learning_rate: ClassVar[float] = 5e-5

    regularisation: float = 0.01
    """λ of the extra loss λ ‖I − W_v‖²; 0: none."""
    compat: Literal["authors"] | None = None
    """"authors": biases and start as in the authors' code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least_zero("regularisation")
        if self.compat not in (None, "authors"):
            raise ConfigError(f"AdapterFusion(compat={self.compat!r}): leave it out, or say 'authors'")

    def over(self, site: Site, width: int) -> OverPiece:
        """Attention for one place."""
        return FusionPiece(self, site, width)

    def controller(self, pieces: Mapping[str, Piece]) -> Controller | None:
        """What adds the regularisation to a run's loss."""
        return NearIdentity(self.regularisation, list(pieces.values())) if self.regularisation else None
