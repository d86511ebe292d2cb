"""HiRA: Hadamard high-rank adaptation (Huang et al. 2025, ICLR, openreview TwJrTz9cRS).

    W′ = W + W ⊙ (B A)

The change has the rank of W times r at most, from LoRA's parameters: B A says by what share each entry of W changes.
B starts at zero, so the model starts as the base. W is what lies inside: two HiRA adapters multiply.

Parameters: r (in + out); a convolution counts in as channels times kernel, an embedding as its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import UnsupportedError
from inlay.pieces.linear import LinearMethod, named
from inlay.pieces.relative import RelativePiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiRA(LinearMethod):
    """W′ = W ⊙ (1 + B A): each entry of W changes by a share of itself."""

    kind = "hira"
    hosts = frozenset({"linear", "conv", "embedding"})
    default_targets = "query,value"
    peft_type = "HIRA"
    paper = "Huang et al. 2025, openreview TwJrTz9cRS"
    peft_convolutions = frozenset({1, 2, 3})

    r: int = named("r", 32)
    """Rank of the shares B A."""
    dropout: float = named("hira_dropout", 0.0)
    """Probability of dropping an entry of the input before the change."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_rate("dropout")

    def piece(self, site: Site) -> Piece:
        return HiRAPiece(self, site)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        if any(getattr(site.module, "groups", 1) > 1 for site in sites):
            raise UnsupportedError("HF peft has no HiRA for grouped convolutions")
        return super().to_peft(sites, index)


class HiRAPiece(RelativePiece):
    """A (r, in, k…) and B (out, r, 1…), by HF peft's names; on an embedding, A (r, rows) and B (dim, r)."""

    def __init__(self, method: HiRA, site: Site) -> None:
        super().__init__(method, site)
        r, (_, *inside) = method.r, self.weight_shape
        if self.kind == "embedding":
            self.hira_embedding_A = self.start(r, site.in_features, value=0.0)
            self.hira_embedding_B = nn.Parameter(nn.init.normal_(self.start(site.out_features, r).data))
        else:
            self.hira_A = self.start(r, *inside)
            self.hira_B = self.start(self.shape[0], r, *[1] * (len(inside) - 1), value=0.0)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.kind != "embedding":
            return super().forward(inner, x)
        rows: Tensor = inner(x)
        return rows + (rows * F.linear(F.embedding(x, self.hira_embedding_A.t()), self.hira_embedding_B)).to(rows.dtype)

    def form(self, *tensors: Tensor) -> Tensor:
        a, b, weight = tensors
        if self.kind == "embedding":
            a, b = b.t(), a.t()
        return (b.flatten(1) @ a.flatten(1)) * weight
