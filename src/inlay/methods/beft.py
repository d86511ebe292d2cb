"""BEFT: bias-efficient fine-tuning (Huang et al. 2025, arXiv:2509.15974).

    y = W x + b + v

A vector v is added to what comes out, by default of the value projections alone, which the paper finds to learn most
from little data. Unlike BitFit it needs no bias in the base. v starts at zero, so the model starts as the base.

Parameters: out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.sites import Site
from inlay.pieces.linear import LinearMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class BEFT(LinearMethod):
    """y = W x + b + v: one vector for each value projection."""

    kind = "beft"
    default_targets = "value"
    peft_type = "BEFT"
    paper = "Huang et al. 2025, arXiv:2509.15974"
    peft_conv1d = False

    def piece(self, site: Site) -> Piece:
        return BEFTPiece(site)


class BEFTPiece(Piece):
    """v as (1, out), by HF peft's name and shape."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        place: Any = {"dtype": trainable_dtype(site.dtype), "device": site.device}
        self.beft_bias = nn.Parameter(torch.zeros(1, site.out_features, **place))

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y: Tensor = inner(x)
        return y + self.beft_bias[0].to(y.dtype)

    def weight(self, weight: Tensor) -> Tensor:
        return weight

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return self.beft_bias[0] if bias is None else bias + self.beft_bias[0]
