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
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import UnsupportedError
from inlay.kernels import dora as kernel
from inlay.kernels.choice import fusible
from inlay.methods.lora import LoRA
from inlay.pieces.lora.piece import LoRAPiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """W' = m · (W + s B A) / ‖W + s B A‖: direction by low rank, magnitude by itself."""

    kind = "dora"
    peft_variant = "use_dora"
    paper = "Liu et al. 2024, arXiv:2402.09353"

    def piece(self, site: Site) -> Piece:
        if site.kind == "parameter":
            raise UnsupportedError(f"DoRA cannot sit at {site.name}, a bare parameter: exclude it, or use LoRA there")
        if self.lora_bias:
            raise UnsupportedError("DoRA(lora_bias=True): the direction has no bias; use LoRA, or bias='lora_only'")
        weight = site.module._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            stored = "quantised" if weight is not None else "parametrised"
            raise UnsupportedError(f"DoRA cannot sit at {site.name}: it needs W's norm, and W is {stored}; use LoRA")
        return DoRAPiece(self, site)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        if any(getattr(site.module, "groups", 1) > 1 for site in sites):
            raise UnsupportedError("HF peft has no DoRA for grouped convolutions")
        return super().to_peft(sites, index) | {"use_dora": True}


class DoRAPiece(LoRAPiece):
    """The low-rank direction of `LoRAPiece` and a magnitude for each output (channel, embedding dimension)."""

    def __init__(self, method: DoRA, site: Site) -> None:
        super().__init__(method, site)
        weight = site.weight.detach()
        weight = weight.T if site.transposed else weight
        # The same expression as at each call, so that m / ‖V‖ is exactly one at first.
        self.magnitude = nn.Parameter(self.norms(weight.to(self.lora_A.dtype) if not self.plain else weight))

    def norms(self, weight: Tensor) -> Tensor:
        """‖V‖ for each output, without gradient."""
        if self.plain and weight.dim() == 2:
            return kernel.norms(weight, self.lora_A, self.lora_B, self.scale)
        with torch.no_grad():
            return self.norm(weight.to(self.lora_A.dtype) + self.delta()).detach()

    def norm(self, direction: Tensor) -> Tensor:
        """‖V‖ for each output: (out,) for linears, (1, out, 1…) for convolutions, (dim,) for embeddings."""
        rows = direction.T if self.kind == "embedding" else direction.flatten(1)
        norm: Tensor = torch.linalg.vector_norm(rows, dim=1)
        norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)  # an output whose weights are all zero stays zero
        return norm.view(1, -1, *[1] * (direction.dim() - 2)) if self.kind == "conv" else norm

    def factor(self, inner: Any) -> Tensor:
        """m / ‖V‖, differentiable in m only; (out, 1…) for convolutions, whose input may lack the batch."""
        factor: Tensor = self.magnitude / self.norms(inner.weight())
        return factor[0] if self.kind == "conv" else factor

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.plain and not args and not kwargs and fusible(x, self.lora_A, self.lora_B, self.magnitude):
            base, p = inner.linear(), self.dropout if self.training else 0.0
            if base is not None:
                y = kernel.adapted(base, x, self.lora_A, self.lora_B, self.magnitude, self.scale, p)
                if y is not None:
                    return y
        y = inner(x, *args, **kwargs)
        change = self.scale * self.change(inner.module, x)
        factor, bias = self.factor(inner), inner.bias()
        if bias is not None and self.kind == "conv":
            bias = bias.view(-1, *[1] * (len(self.shape) - 2))
        direction = y if bias is None else y - bias
        # Written around y, so that a factor of exactly one leaves y's bits alone.
        return y + ((factor - 1) * direction + factor * change).to(y.dtype)

    def weight(self, weight: Tensor) -> Tensor:
        direction = weight + self.delta()
        factor: Tensor = self.magnitude / self.norm(direction).detach()
        if self.kind != "embedding":
            factor = factor.view(-1, *[1] * (direction.dim() - 1))
        return factor * direction

    def file_tensors(self) -> dict[str, Tensor]:
        return super().file_tensors() | {"lora_magnitude_vector": self.magnitude}

    def load_file_tensors(self, tensors: Any) -> None:
        rest = dict(tensors)
        with torch.no_grad():
            self.magnitude.copy_(rest.pop("lora_magnitude_vector"))
        super().load_file_tensors(rest)
