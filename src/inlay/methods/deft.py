"""DEFT: decompositional efficient fine-tuning (Kumar et al. 2025, arXiv:2509.22793), HF peft's DEFT.

    W′ = (I − Q Kᵀ) W + s · Q R,     s = alpha / r, or 1

Q Kᵀ takes a part of what W gives away, and Q R puts something else in its place. Q is P and K is relu(P), or both are
the orthonormal columns of P, so that Q Kᵀ is a projection. The change is Q (s R − Kᵀ W), of rank r: it runs as a LoRA
whose first factor is that difference. R starts as Kᵀ W / s, so the model starts as the base. With `para` nothing is put
back, and it does not. W is what lies inside: of two adapters the outer one takes away from what the inner one made.

The other DEFT, density-efficient fine-tuning, is a loss: `density`.

Parameters: r (in + out), with r at most out; r out with `para`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.engine.checkpoint import LOADING
from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels import lora as kernel
from inlay.kernels import low_rank, suppression
from inlay.kernels.choice import without_autocast
from inlay.pieces.linear import LinearMethod, named
from inlay.pieces.relative import RelativePiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class DEFT(LinearMethod):
    """W′ = (I − Q Kᵀ) W + s · Q R: takes a subspace of the outputs away, and puts trained ones in its place."""

    kind = "deft"
    default_targets = "query,value"
    peft_type = "DEFT"
    paper = "Kumar et al. 2025, arXiv:2509.22793"
    peft_constants = (("bias", "none"),)

    r: int = named("r", 8)
    """Rank of what is taken away and of what is put in; at most the number of outputs."""
    alpha: float | None = named("alpha", None)
    """Numerator of the scale s; None: s is one."""
    decomposition_method: Literal["relu", "qr"] = named("decomposition_method", "relu")
    """What Q and K are: P and relu(P), or both the orthonormal columns of P."""
    para: bool = named("para", False)
    """Take away only, without R."""
    dropout: float = named("deft_dropout", 0.0)
    """Probability of zeroing an entry of x before R, in training."""
    init_weights: bool = named("init_weights", True)
    """Start R where the model is the base; otherwise at random, and part of W is gone from the start."""
    init_scale: float = named("init_scale", 1.0)
    """Scale of that random start: R has a standard deviation of 0.02 times this."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_rate("dropout")
        self.check_choice("decomposition_method", ("relu", "qr"))
        self.check_number("init_scale", *(("alpha",) if self.alpha is not None else ()))
        if self.init_scale < 0:
            raise ConfigError(f"DEFT(init_scale={self.init_scale!r}): a positive number is needed")

    def piece(self, site: Site) -> Piece:
        return DEFTPiece(self, site)


class DEFTPiece(RelativePiece):
    """P (out, r) and R (r, in), by HF peft's names."""

    deft_R: nn.Parameter | None

    def __init__(self, method: DEFT, site: Site) -> None:
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
