"""A trained vector on what goes into a place, or on what comes out of it: times it, or added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import UnsupportedError
from inlay.kernels.scaling import scaled


class IA3Piece(Piece):
    """The vector l at one site, in the shape that HF peft gives it: (out, 1), (1, in) or (1, channels, 1, …)."""

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__()
        self.additive = method.form == "additive"
        self.at_input = method.at_input(site)
        self.kind = site.kind
        self.groups = int(getattr(site.module, "groups", 1)) if site.kind == "conv" else 1
        if site.kind == "parameter" and (self.additive or (site.bias is not None and not self.at_input)):
            reason = "a bare parameter has no output to add to" if self.additive else "its bias is added apart from it"
            raise UnsupportedError(f"IA3 cannot sit at {site.name}: {reason}; exclude it, or use LoRA there")
        start = torch.zeros if self.additive else torch.ones
        self.ia3_l = nn.Parameter(start(self.shape(site), dtype=trainable_dtype(site.dtype), device=site.device))

    def shape(self, site: Site) -> tuple[int, ...]:
        """The shape of l at a site; experts have one vector each."""
        size = site.in_features if self.at_input else site.out_features
        if site.kind == "conv":
            return (1, size, *[1] * (site.weight.dim() - 2))
        if site.weight.dim() == 3:
            return (site.weight.shape[0], *((size, 1) if self.at_input == site.transposed else (1, size)))
        return (1, size) if self.at_input else (size, 1)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.at_input:
            return inner(self.act(x), *args, **kwargs)
        return self.act(inner(x, *args, **kwargs))

    def act(self, x: Tensor) -> Tensor:
        """l ⊙ x or x + l, formed in the precision of l and rounded once."""
        l = self.ia3_l[0] if self.kind == "conv" else self.ia3_l.flatten()  # noqa: E741  (the paper's letter)
        if self.additive or self.kind == "conv":
            return (x + l if self.additive else x * l).to(x.dtype)
        return scaled(x, l)

    @property
    def mergeable(self) -> bool:
        """W (x + l) = W x + b + W l is no change of W, and of b only where W is at hand."""
        return not (self.additive and self.at_input)

    def weight(self, weight: Tensor) -> Tensor:
        if self.additive:
            return weight
        if self.kind != "conv":
            return weight * self.ia3_l
        if not self.at_input:
            return weight * self.ia3_l.transpose(0, 1)
        # Each group of outputs sees its own channels: (groups, 1, in / groups, 1, …) over (groups, out / groups, …).
        scale = self.ia3_l.reshape(self.groups, 1, -1, *self.ia3_l.shape[2:])
        return (weight.reshape(self.groups, -1, *weight.shape[1:]) * scale).reshape(weight.shape)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        if self.at_input:
            return bias
        vector = self.ia3_l.flatten()
        if self.additive:
            return vector if bias is None else bias + vector
        return None if bias is None else bias * vector
