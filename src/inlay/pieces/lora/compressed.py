"""VeLoRA's piece: LoRA's outside training; in training one that keeps x compressed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import CheckpointError
from inlay.kernels import compressed
from inlay.pieces.lora.piece import LoRAPiece

PROJECTIONS = ("batch_average", "batch_average_once", "random")


class CompressedLoRAPiece(LoRAPiece):
    """A, B, and the unit vector e (d), under HF peft's name for it; zero until a batch has been seen."""

    lora_velora_embed: Tensor

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        self.num_groups, self.rho, self.projection = method.num_groups, method.rho, method.projection
        e = self.lora_A.new_zeros(-(-site.in_features // self.num_groups))
        if self.projection == "random":
            e = F.normalize(torch.randn_like(e), dim=0)
        self.register_buffer("lora_velora_embed", e.detach())

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(inner, x, *args, **kwargs)
        y = inner(x, *args, **kwargs)
        x = F.dropout(x, self.dropout) if self.dropout else x
        direction = self.direction(x)
        factors = self.lora_A, self.lora_B, self.scale
        y = compressed.adapted(y, x, *factors, direction, self.num_groups, self.rho)
        return y if self.lora_bias is None else y + (self.scale * self.lora_bias).to(y.dtype)

    def direction(self, x: Tensor) -> Tensor:
        """e for this batch, which is remembered."""
        held = self.lora_velora_embed
        if self.projection == "random" or not x.numel():  # an expert of a mixture that no token was sent to
            return held
        found = compressed.mean_direction(x, self.num_groups).to(held.dtype)
        if self.projection == "batch_average_once":
            found = torch.where(held.any(), held, found)
        with torch.no_grad():
            held.copy_(found)
        return found

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.lora_bias is not None else (self.lora_A, self.lora_B, self.scale)

    def file_tensors(self) -> dict[str, Tensor]:
        return super().file_tensors() | {"lora_velora_embed": self.lora_velora_embed}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        rest = dict(tensors)
        self.lora_velora_embed.copy_(rest.pop("lora_velora_embed"))
        super().load_file_tensors(rest)

    def values_of(self, other: Piece) -> list[tuple[Tensor, Tensor]]:
        if getattr(other, "num_groups", self.num_groups) != self.num_groups:
            raise CheckpointError(f"it has {other.num_groups} groups, and there are {self.num_groups} here")
        return super().values_of(other)
