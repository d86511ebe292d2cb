"""One trained vector, in which the factors of all places look their entries up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.sites import Site
from inlay.pieces.projections import Placed, Shared, SharingPiece, as_trained


class OneVector(Shared):
    """θ (d), trained, and by what its entries are scaled."""

    scale: Tensor

    def __init__(self, method: Any, placed: Placed) -> None:
        super().__init__()
        start, bound = torch.empty(method.theta_d_length), abs(method.init_theta_d_bound)
        self.unilora_theta_d = nn.Parameter(as_trained(placed, start.uniform_(-bound, bound)))
        self.register_buffer("scale", as_trained(placed, torch.zeros_like(start)), persistent=False)

    def root_tensors(self) -> dict[str, Tensor]:
        return {"unilora_theta_d": self.unilora_theta_d}


class UniLoRAPiece(SharingPiece):
    """The indices of A (r, in) and of B (out, r)."""

    shared: OneVector
    unilora_indices_A: Tensor
    unilora_indices_B: Tensor

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        self.saves, (out, width) = method.save_indices, self.shape
        for name, shape in (("unilora_indices_A", (method.r, width)), ("unilora_indices_B", (out, method.r))):
            index = torch.empty(shape, dtype=torch.int32, device=site.device)
            self.register_buffer(name, index, persistent=False)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        a, b = self.unilora_indices_A, self.unilora_indices_B
        theta = (self.shared.unilora_theta_d * self.shared.scale).to(a.device)
        return theta.index_select(0, a.flatten()).view(a.shape), theta.index_select(0, b.flatten()).view(b.shape), 1.0

    def file_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for letter, index in (("A", self.unilora_indices_A), ("B", self.unilora_indices_B)):
            if self.saves:
                scale = self.shared.scale.to(index.device)[index.long()]
                found |= {f"unilora_indices_{letter}": index.long(), f"unilora_scales_{letter}": scale}
        return found

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for letter, own in (("A", self.unilora_indices_A), ("B", self.unilora_indices_B)):
            if self.saves:
                index, scale = tensors[f"unilora_indices_{letter}"], self.shared.scale
                own.copy_(index)
                scale[index.to(scale.device)] = tensors[f"unilora_scales_{letter}"].to(scale)
