"""AdaMSS's pieces: a small change for each cluster of a weight's rows, together one LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.checkpoint import LOADING
from inlay.engine.piece import Method
from inlay.engine.sites import Site
from inlay.kernels import clusters
from inlay.kernels import lora as kernel
from inlay.kernels.choice import without_autocast
from inlay.pieces.linear import DeltaPiece


class AdaMSSPiece(DeltaPiece):
    """A_k (rank, r), B_k (rows of k, rank) and N (r, in + 1), frozen, as peft names them; `clusters` (out): k."""

    adamss_newB: Tensor
    clusters: Tensor
    order: Tensor
    """Where each row of W stands when they are stacked cluster by cluster."""

    def __init__(
        self, method: Method, site: Site, *, r: int, count: int, rank: int, threshold: float, seed: int
    ) -> None:
        super().__init__(method, site)
        (out, width), self.count, self.has_bias = self.shape, count, site.bias is not None
        self.r, self.seed = min(r, out, width + self.has_bias), seed
        self.register_buffer("adamss_newB", torch.zeros(self.r, width + self.has_bias, **self.place), persistent=False)
        self.register_buffer("clusters", torch.zeros(out, dtype=torch.long, device=site.device), persistent=False)
        self.register_buffer("order", torch.zeros(out, dtype=torch.long, device=site.device), persistent=False)
        if LOADING.get():
            self.resize(torch.zeros(out, dtype=torch.long), [1])
            return
        left, rows = self.found(site)
        starts = clusters.starts(left, rows, rank, threshold)
        self.resize(rows, [len(start) for start in starts])
        with torch.no_grad():
            for a, start in zip(self.adamss_A, starts, strict=True):
                a.copy_(start)

    def found(self, site: Site) -> tuple[Tensor, Tensor]:
        """U (out, r) of [W b] and the cluster of each row; N is set."""
        weight = site.weight.detach().T if site.transposed else site.weight.detach()
        whole = weight if site.bias is None else torch.cat((weight, site.bias.detach()[:, None]), 1)
        left, right = clusters.singular_vectors(whole.float(), self.r, self.seed)
        self.adamss_newB.copy_(right)
        return left, clusters.of_rows(left, self.count)

    def resize(self, rows: Tensor, ranks: Sequence[int]) -> None:
        """Make room for these clusters, with changes of these ranks that start at zero."""
        self.clusters.copy_(rows)
        self.order.copy_(rows.argsort(stable=True).argsort())
        counts = [max(1, rank) for rank in ranks]
        sizes = torch.bincount(rows.cpu(), minlength=len(counts)).tolist()
        self.adamss_A = nn.ParameterList(self.start(rank, self.r, value=0.0) for rank in counts)
        pairs = zip(sizes, counts, strict=True)
        self.adamss_B = nn.ParameterList(self.start(size, rank, value=0.0) for size, rank in pairs)

    def thin(self) -> tuple[Tensor, Tensor]:
        """A (K · rank, r) within N's space, and B (out, K · rank), block-diagonal up to the order of its rows."""
        parts: list[Tensor] = list(self.adamss_B)
        stacked: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        return torch.cat(list(self.adamss_A)), stacked.index_select(0, self.order)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with without_autocast(x):
            a, b = self.thin()
            both = a @ self.adamss_newB
        y = kernel.adapted(inner, x, both[:, : self.shape[1]], b, 1.0)
        return y + (b @ both[:, -1]).to(y.dtype) if self.has_bias else y

    def delta(self) -> Tensor:
        a, b = self.thin()
        return b @ (a @ self.adamss_newB[:, : self.shape[1]])

    def bias(self, bias: Tensor | None) -> Tensor | None:
        a, b = self.thin()
        return bias if bias is None else bias + b @ (a @ self.adamss_newB[:, -1])

    def file_tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), "adamss_newB": self.adamss_newB}
