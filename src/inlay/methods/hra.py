"""HRA: Householder reflection adaptation (Yuan et al. 2024, arXiv:2405.17484).

    y = W H_1 … H_r x + b,     H_i = I − 2 u_i u_iᵀ / ‖u_i‖²

The chain acts on x as one product of rank r, at the cost of a LoRA. The u_i start equal two by two, so that the model
starts as the base; not so with an odd r, whose product is never the identity. With `apply_gs` the u_i are made
orthogonal first, and the product is I − 2 Q Qᵀ with Q a basis of what they span: the mirror image in that space, which
is not the base at the start either.

Parameters: r in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError
from inlay.kernels import reflections
from inlay.pieces.input_rotation import InputRotation, only_square_kernels
from inlay.pieces.linear import LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class HRA(LinearMethod):
    """y = W H_1 … H_r x + b: an orthogonal matrix from r reflections."""

    kind = "hra"
    hosts = frozenset({"linear", "conv"})
    default_targets = "query,value"
    peft_type = "HRA"
    paper = "Yuan et al. 2024, arXiv:2405.17484"
    peft_constants = (("bias", "none"),)
    peft_conv1d = False
    peft_convolutions = frozenset({2})

    r: int = named("r", 8)
    """How many reflections; an even number, or the model does not start as the base."""
    apply_gs: bool = named("apply_GS", False)
    """Make the vectors orthogonal first (Gram–Schmidt)."""

    def __post_init__(self) -> None:
        self.check_whole("r")

    def piece(self, site: Site) -> Piece:
        return HRAPiece(self, site)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        entries = super().to_peft(sites, index)
        only_square_kernels(self, sites)
        return entries


class HRAPiece(InputRotation):
    """The vectors u_i as columns: `hra_u` (in, r)."""

    def __init__(self, method: HRA, site: Site) -> None:
        super().__init__(method, site)
        self.apply_gs = method.apply_gs
        if method.apply_gs and method.r > self.size:
            raise ConfigError(f"HRA at {site.name}: {method.r} vectors of {self.size} entries cannot be orthogonal")
        distinct = method.r if method.apply_gs else (method.r + 1) // 2
        u = nn.init.kaiming_uniform_(torch.empty(self.size, distinct, **self.place), a=math.sqrt(5))
        self.hra_u = nn.Parameter(u if method.apply_gs else u.repeat_interleave(2, dim=1)[:, : method.r].clone())

    def turned(self, x: Tensor, inverse: bool = False) -> Tensor:
        if self.apply_gs:
            return reflections.mirrored(x, self.hra_u)
        v = reflections.pairs(self.hra_u)
        s = reflections.middle(v)
        return reflections.reflected(x, v, s.T if inverse else s)
