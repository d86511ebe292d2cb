"""A part of what a weight gives is taken away, and a trained one put in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.checkpoint import LOADING
from inlay.engine.sites import Site
from inlay.kernels import lora as kernel
from inlay.kernels import low_rank, suppression
from inlay.kernels.choice import without_autocast
from inlay.pieces.relative import RelativePiece


class DEFTPiece(RelativePiece):
    """P (out, r) and R (r, in), by HF peft's names."""

    deft_R: nn.Parameter | None

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        out, r = self.shape[0], min(method.r, self.shape[0])
        self.scale = 1.0 if method.alpha is None else method.alpha / r
        self.orthogonal = method.decomposition_method == "qr"
        self.deft_P = nn.Parameter(torch.empty(out, r, **self.place).normal_(std=0.02))
        self.register_parameter("deft_R", None if method.para else self.start(r, self.shape[1], value=0.0))
        if self.deft_R is not None and not LOADING.get():
            with torch.no_grad():
                if method.init_weights:
                    weight = site.weight.detach()
                    given = suppression.taken(self.sides()[1], weight.T if site.transposed else weight)
                    self.deft_R.copy_(given / self.scale)
                else:
                    self.deft_R.normal_(std=0.02 * method.init_scale)

    def sides(self) -> tuple[Tensor, Tensor]:
        """Q and K (out, r)."""
        p: Tensor = self.deft_P
        if not self.orthogonal:
            return p, p.relu()
        with without_autocast(p):
            q = torch.linalg.qr(p.float())[0].to(p.dtype)
        return q, q

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        (q, k), rate = self.sides(), self.dropout if self.training else 0.0
        if self.deft_R is not None and not rate:
            return kernel.adapted(inner, x, suppression.instead(self.deft_R, k, inner.weight(), self.scale), q, 1.0)
        y = kernel.adapted(inner, x, suppression.taken(k, inner.weight()), q, -1.0)
        if self.deft_R is None:
            return y
        return y + (self.scale * low_rank.linear(nn.functional.dropout(x, rate), self.deft_R, q)).to(y.dtype)

    def change(self, weight: Tensor) -> Tensor:
        q, k = self.sides()
        if self.deft_R is None:
            return -q @ suppression.taken(k, weight)
        return q @ suppression.instead(self.deft_R, k, weight, self.scale)
