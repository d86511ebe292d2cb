"""QA-LoRA's piece: LoRA on the means of groups of inputs."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import CheckpointError, ConfigError
from inlay.kernels import low_rank
from inlay.kernels.choice import compute_dtype, fusible
from inlay.kernels.lora import AddLowRank
from inlay.pieces.lora.piece import LoRAPiece

POOLINGS = ("sum", "mean", "groups")


class PooledLoRAPiece(LoRAPiece):
    """s · c · B A x̄, with A (r, groups) and x̄ the mean of each group of `group` inputs; x̄ is kept, and not x."""

    def __init__(self, method: Any, site: Site) -> None:
        self.group = method.group_size
        if site.in_features % self.group:
            raise ConfigError(
                f"QALoRA(group_size={self.group}) does not divide the {site.in_features} inputs of {site.name}: choose "
                "a divisor, or give an override for this place"
            )
        super().__init__(method, site)
        self.factor = {"sum": self.group, "mean": 1, "groups": site.in_features // self.group}[method.pooling]
        wide = self.lora_A  # of which a column a group is as good a start; kaiming's bound is that of so many columns
        a = wide.detach()[:, :: self.group] * (math.sqrt(self.group) if method.init == "kaiming" else 1)
        self.lora_A = nn.Parameter(a) if isinstance(wide, nn.Parameter) else a

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = inner(x, *args, **kwargs)
        x = x.to(self.lora_A.dtype) if self.exact else x
        x = F.dropout(x, self.dropout) if self.dropout and self.training else x
        means = x.reshape(*x.shape[:-1], x.shape[-1] // self.group, self.group).mean(-1)
        scale = self.scale * self.factor
        if self.plain and fusible(y, means, self.lora_A, self.lora_B):
            factors = self.lora_A, self.lora_B, scale
            return AddLowRank.apply(y, means, *factors, compute_dtype(x), None, None)  # type: ignore[no-untyped-call]
        change = scale * low_rank.linear(means, self.lora_A, self.lora_B)
        change = change if self.lora_bias is None else change + (self.scale * self.lora_bias).to(change.dtype)
        return y + change.to(y.dtype)

    def by_group(self) -> Tensor:
        """What is added to each entry of each group of a row of W: (out, groups), for `kernels.zero_points.folded`."""
        change: Tensor = (self.scale * self.factor / self.group) * (self.lora_B @ self.lora_A)
        return change

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        if self.lora_bias is not None:
            return None
        wide = self.lora_A.repeat_interleave(self.group, 1)
        return wide, self.lora_B, self.scale * self.factor / self.group

    def delta(self) -> Tensor:
        return self.by_group().repeat_interleave(self.group, 1)

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta()

    def values_of(self, other: Piece) -> list[tuple[Tensor, Tensor]]:
        if isinstance(other, PooledLoRAPiece) and (other.group, other.factor) != (self.group, self.factor):
            its, own = (f"groups of {one.group} times {one.factor}" for one in (other, self))
            raise CheckpointError(f"it reads {its}, and {own} here")
        return super().values_of(other)
