"""The entries of one weight of largest, or smallest, magnitude, and a LoRA beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.kernels import low_rank, positions
from inlay.pieces.linear import DeltaPiece


class SupertuningPiece(DeltaPiece):
    """The entries (n) and their places in the flattened weight (n), by HF peft's names; A (r, in) and B (out, r)."""

    supertuning_indices: Tensor
    order: Tensor

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        (o, i), weight = self.shape, site.weight.detach()
        if weight.numel() != o * i or not weight.is_floating_point():
            raise UnsupportedError(f"Supertuning cannot sit at {site.name}: it needs W, and W is quantised")
        count = int(o * i * (1 - method.sparsity))
        if not count:
            raise ConfigError(f"Supertuning(sparsity={method.sparsity}) leaves nothing to train in {site.name}")
        magnitudes = (weight.t() if site.transposed else weight).abs().flatten()
        places = torch.topk(magnitudes, count, largest=method.select_top).indices.sort().values
        self.supertuning_values = self.start(count, value=0.0)
        self.register_buffer("supertuning_indices", places.int())
        self.register_buffer("order", places.argsort())
        self.scale, self.r = 0.0, method.r
        if method.r is not None:
            self.scale = (2 * method.r if method.alpha is None else method.alpha) / method.r
            self.supertuning_lora_A = self.start(method.r, i)
            self.supertuning_lora_B = self.start(o, method.r, value=0.0)

    def entries(self, values: Tensor) -> tuple[Tensor, positions.Positions]:
        """S as values at positions, which the kernel wants in the order of the weight."""
        where = positions.places(self.supertuning_indices[self.order], self.shape)
        return values.index_select(0, self.order), where

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = positions.changed(inner, x, *self.entries(self.supertuning_values))
        if self.r is None:
            return y
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        return y + (self.scale * low_rank.linear(dropped, self.supertuning_lora_A, self.supertuning_lora_B)).to(y.dtype)

    def form(self, *tensors: Tensor) -> Tensor:
        values, where = self.entries(tensors[0])
        found = positions.scattered(values, where.flat(), self.shape)
        return found if self.r is None else found + self.scale * (tensors[2] @ tensors[1])

    def file_tensors(self) -> dict[str, Tensor]:
        found = {"supertuning_values": self.supertuning_values, "supertuning_indices": self.supertuning_indices}
        if self.r is not None:
            found["supertuning_lora_A.weight"] = self.supertuning_lora_A
            found["supertuning_lora_B.weight"] = self.supertuning_lora_B
        return found

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_file_tensors(tensors)
        self.order.copy_(self.supertuning_indices.argsort())
