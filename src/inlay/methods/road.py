"""RoAD: 2-D rotary adaptation (Liao and Monz 2024, arXiv:2409.00119).

    y = R (W x + b),     [y_j ; y_j′] = [α cos θ, −α sin θ ; α sin θ, α cos θ] [z_j ; z_j′] for each pair of outputs

Variant 1 has one θ and one α for a pair, 2 one for each row of it, 4 one for each entry. θ starts at zero and α at
one, so the model starts as the base. The bias turns along.

Parameters: out, 2 out or 4 out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels import paired
from inlay.pieces.linear import LinearMethod, named

SIZES = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoAD(LinearMethod):
    """y = R (W x + b), R turning and scaling the outputs two by two."""

    kind = "road"
    default_targets = "query,value"
    peft_type = "ROAD"
    paper = "Liao, Monz 2024, arXiv:2409.00119"
    peft_conv1d = False

    variant: str = named("variant", "road_1")
    """An angle and a scale for each pair ("road_1"), for each output ("road_2"), or two for each ("road_4")."""
    group_size: int = named("group_size", 64)
    """Outputs in a group, whose first half is paired with its second; it must divide out."""

    def __post_init__(self) -> None:
        self.check_choice("variant", list(SIZES))
        self.check_whole("group_size", least=2)
        if self.group_size % 2:
            raise ConfigError(f"RoAD(group_size={self.group_size}): an even number is needed")

    def piece(self, site: Site) -> Piece:
        return RoADPiece(self, site)


class RoADPiece(Piece):
    """θ and α by HF peft's names, (out / 2), (out) or (2 out)."""

    def __init__(self, method: RoAD, site: Site) -> None:
        super().__init__()
        self.variant, self.apart = method.variant, method.group_size // 2
        if site.out_features % method.group_size:
            text = f"{site.out_features} outputs are no groups of {method.group_size}; set group_size to a divisor"
            raise ConfigError(f"RoAD at {site.name}: {text}")
        size = site.out_features * SIZES[method.variant] // 2
        self.road_theta = nn.Parameter(torch.zeros(size, dtype=trainable_dtype(site.dtype), device=site.device))
        self.road_alpha = nn.Parameter(torch.ones_like(self.road_theta))

    def columns(self) -> tuple[Tensor, Tensor]:
        """What each output has of itself, and what of its partner, both (out)."""
        a, s = self.road_alpha * self.road_theta.cos(), self.road_alpha * self.road_theta.sin()
        if self.variant == "road_2":
            return a, s
        if self.variant == "road_1":
            return self.twice(a), self.twice(s)
        return a.view(-1, 2, 2 * self.apart)[:, 0].flatten(), s.view(-1, 2, 2 * self.apart)[:, 1].flatten()

    def twice(self, column: Tensor) -> Tensor:
        """The same for both of a pair."""
        return column.view(-1, 1, self.apart).expand(-1, 2, -1).flatten()

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        return paired.turned(inner(*args, **kwargs), *self.columns(), self.apart)

    def weight(self, weight: Tensor) -> Tensor:
        a, s = self.columns()
        return paired.turned(weight.to(torch.promote_types(weight.dtype, a.dtype)).T, a, s, self.apart).T

    def bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        a, s = self.columns()
        return paired.turned(bias.to(torch.promote_types(bias.dtype, a.dtype)), a, s, self.apart)
