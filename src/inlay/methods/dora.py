"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353).

    W' = m · V / ‖V‖,   V = W + s · B A,      norm over the inputs of each output, without gradient (section 4.3)

m (out) starts as ‖W‖, so the model starts as the base. Under the onion, W is what the inner pieces amount to, so two
adapters compose as their merged weights do.

Parameters: r · (in + out) + out for each linear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import UnsupportedError
from inlay.methods.lora import LoRA, LoRAPiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """W' = m · (W + s B A) / ‖W + s B A‖: direction by low rank, magnitude by itself."""

    kind = "dora"
    paper = "Liu et al. 2024, arXiv:2402.09353"

    def piece(self, site: Site) -> Piece:
        if site.kind == "parameter":
            raise UnsupportedError(f"DoRA cannot sit at {site.name}, a bare parameter: exclude it, or use LoRA there")
        if self.lora_bias:
            raise UnsupportedError("DoRA(lora_bias=True): the direction has no bias; use LoRA, or bias='lora_only'")
        return DoRAPiece(self, site)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        return super().to_peft(sites, index) | {"use_dora": True}


class DoRAPiece(LoRAPiece):
    """The low-rank direction of `LoRAPiece` and a magnitude for each output (channel, embedding dimension)."""

    def __init__(self, method: DoRA, site: Site) -> None:
        super().__init__(method, site)
        weight = site.weight.detach().to(self.lora_A.dtype)
        self.magnitude = nn.Parameter(self.norm(weight.T if site.transposed else weight))

    def norm(self, direction: Tensor) -> Tensor:
        """‖V‖ for each output: (out,) for linears, (1, out, 1…) for convolutions, (dim,) for embeddings."""
        if self.kind == "embedding":
            return torch.linalg.vector_norm(direction, dim=0)
        norm = torch.linalg.vector_norm(direction.flatten(1), dim=1)
        return norm.view(1, -1, *[1] * (direction.dim() - 2)) if self.kind == "conv" else norm

    def factor(self, inner: Any) -> Tensor:
        """m / ‖V‖, differentiable in m only."""
        with torch.no_grad():
            norm = self.norm(inner.weight().to(self.magnitude.dtype) + self.delta())
        return self.magnitude / norm

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = inner(x, *args, **kwargs)
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training and self.kind != "embedding" else x
        change = self.scale * self.change(inner.module, dropped, self.lora_A, self.lora_B)
        if self.start_A is not None:
            change = change - self.scale * self.change(inner.module, dropped, self.start_A, self.start_B)
        factor = self.factor(inner)
        bias = inner.bias()
        if bias is not None and self.kind == "conv":
            bias = bias.view(1, -1, *[1] * (y.dim() - 2))
        direction = y if bias is None else y - bias
        # Written around y, so that a factor of exactly one leaves y's bits alone.
        return y + ((factor - 1) * direction + factor * change).to(y.dtype)

    def weight(self, weight: Tensor) -> Tensor:
        direction = weight + self.delta()
        factor = self.magnitude / self.norm(direction).detach()
        if self.kind == "embedding":
            return factor * direction
        return factor.view(-1, *[1] * (direction.dim() - 1)) * direction

    def file_tensors(self) -> dict[str, Tensor]:
        return super().file_tensors() | {"lora_magnitude_vector": self.magnitude}

    def load_file_tensors(self, tensors: Any) -> None:
        rest = dict(tensors)
        with torch.no_grad():
            self.magnitude.copy_(rest.pop("lora_magnitude_vector"))
        super().load_file_tensors(rest)
