"""C3A: circular convolution adaptation (Chen et al. 2024, arXiv:2407.19342).

    W′ = W + C / in,     C of circulant blocks b × b:  C_pq[j, a] = k_pq[(a − j) mod b]

Every block of the change is given by b numbers and can be of full rank. Products with it are circular convolutions, by
Fourier transforms of x, so that C is never formed.

Parameters: in · out / b.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels import circular
from inlay.pieces.linear import DeltaPiece, LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class C3A(LinearMethod):
    """W + C / in with C of circulant blocks: of high rank, and one number where a matrix has b."""

    kind = "c3a"
    default_targets = "query,value"
    peft_type = "C3A"
    paper = "Chen et al. 2024, arXiv:2407.19342"
    peft_constants = (("bias", "none"),)
    peft_conv1d = False

    block_size: int = named("block_size", 256, "block_size_pattern")
    """b, a divisor of in and of out; the larger, the fewer parameters."""
    init: Literal["zeros", "gaussian", "kaiming_uniform", "xavier_uniform"] = "zeros"
    """How k starts. HF peft starts with xavier_uniform, and so not as the base."""

    def __post_init__(self) -> None:
        self.check_whole("block_size")
        self.check_choice("init", ("zeros", "gaussian", "kaiming_uniform", "xavier_uniform"))

    def piece(self, site: Site) -> Piece:
        return C3APiece(self, site)


class C3APiece(DeltaPiece):
    """The kernels k (out / b, in / b, b), by HF peft's name."""

    def __init__(self, method: C3A, site: Site) -> None:
        super().__init__(method, site)
        (o, i), b = self.shape, method.block_size
        if o % b or i % b:
            hint = f"{site.name} is {o} x {i}; the largest block size that divides both is {math.gcd(o, i)}"
            raise ConfigError(f"C3A(block_size={b}): {hint}")
        self.c3a_kernel, self.scale = self.start(o // b, i // b, b, value=0.0), 1 / i
        spread = {"kaiming_uniform": 1 / math.sqrt(i), "xavier_uniform": math.sqrt(6 / (i + o))}.get(method.init)
        if method.init == "gaussian":
            nn.init.normal_(self.c3a_kernel)
        elif spread is not None:
            nn.init.uniform_(self.c3a_kernel, -spread, spread)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = inner(x)
        return y + circular.product(x, self.c3a_kernel, self.scale).to(y.dtype)

    def form(self, *tensors: Tensor) -> Tensor:
        return self.scale * circular.matrix(tensors[0])
