"""BOFT: orthogonal butterfly fine-tuning (Liu et al. 2023, arXiv:2311.06243).

    y = s ⊙ (W B_1 … B_m x) + b,     B_j = P_j diag(R_j1, …, R_jn)ᵀ P_jᵀ

B_1 turns blocks of b neighbouring entries, B_2 blocks made of halves that lie one block apart, B_3 two, and so on, as a
fast Fourier transform pairs its inputs: m factors mix 2^(m−1) blocks. R comes from a matrix by Cayley's formula, of
its skew-symmetric part. Matrices start at zero and s at one, so the model starts as the base.

Parameters: m in b + out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError
from inlay.kernels import butterfly
from inlay.pieces.input_rotation import InputRotation, only_square_kernels
from inlay.pieces.linear import LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class BOFT(LinearMethod):
    """y = s ⊙ (W B_1 … B_m x) + b with butterfly factors B_j."""

    kind = "boft"
    hosts = frozenset({"linear", "conv"})
    default_targets = "query,value"
    peft_type = "BOFT"
    paper = "Liu et al. 2023, arXiv:2311.06243"
    peft_constants = (("boft_dropout", 0.0), ("bias", "none"))
    peft_conv1d = False
    peft_convolutions = frozenset({2})

    block_size: int = named("boft_block_size", 4)
    """Entries b in a block. 0: see `block_num`."""
    block_num: int = named("boft_block_num", 0)
    """The number of blocks, with `block_size=0`."""
    n_butterfly_factor: int = named("boft_n_butterfly_factor", 1)
    """How many factors m; 1 is OFT with a scale."""

    def __post_init__(self) -> None:
        self.check_whole("block_size", "block_num", least=0)
        self.check_whole("n_butterfly_factor")
        if (self.block_num == 0) == (self.block_size == 0):
            sizes = f"block_num={self.block_num}, block_size={self.block_size}"
            raise ConfigError(f"BOFT({sizes}): set one of them, and the other to 0")

    def piece(self, site: Site) -> Piece:
        return BOFTPiece(self, site)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        entries = super().to_peft(sites, index)
        only_square_kernels(self, sites)
        return entries


class BOFTPiece(InputRotation):
    """The matrices that R is made of, (m, n, b, b), and the scale s, (out, 1), or (1, out) at a convolution."""

    def __init__(self, method: BOFT, site: Site) -> None:
        super().__init__(method, site)
        m, size = method.n_butterfly_factor, method.block_size or self.size // method.block_num
        whole = size > 0 and self.size % (size * 2 ** (m - 1)) == 0 and method.block_num * size in (0, self.size)
        if not whole or (m > 1 and size % 2):
            raise ConfigError(f"BOFT at {site.name}: {self.size} entries cannot be {m} factors of blocks of {size}")
        self.boft_R = nn.Parameter(torch.zeros(m, self.size // size, size, size, **self.place))
        outputs = site.weight.shape[0] if site.kind == "conv" else site.out_features
        self.boft_s = nn.Parameter(torch.ones((1, outputs) if site.kind == "conv" else (outputs, 1), **self.place))

    def turned(self, x: Tensor, inverse: bool = False) -> Tensor:
        return butterfly.turned(x, self.boft_R, inverse)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(inner, x, *args, **kwargs)
        return y if self.kind == "conv" else butterfly.stretched(y, inner.bias(), self.boft_s.flatten())

    def weight(self, weight: Tensor) -> Tensor:
        return super().weight(weight) * self.boft_s.view(-1, *[1] * (weight.dim() - 1))
