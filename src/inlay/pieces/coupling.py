"""Additive and affine coupling (NICE, GLOW): networks that can be run backwards, and the pieces that run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.pieces.bottlenecks.bottleneck import Bottleneck

CLAMP = 5.0


class Coupling(nn.Module):
    """y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁), with x₁ and x₂ the halves of x; F and G are bottlenecks."""

    def __init__(self, width: int, method: Any, site: Site) -> None:
        super().__init__()
        first, last = self.sizes = width // 2, width - width // 2
        divided = [max(1, int(size // method.reduction_factor)) for size in self.sizes]
        self.f = Bottleneck(last, divided[1], first, method, site)
        self.g = Bottleneck(first, divided[0], last, method, site)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x[..., : self.sizes[0]], x[..., self.sizes[0] :]
        y1 = x1 + self.f(x2).to(x.dtype)
        return torch.cat((y1, x2 + self.g(y1).to(x.dtype)), dim=-1)

    def inverse(self, y: Tensor) -> Tensor:
        """x with `forward(x)` = y, to rounding: what was added is computed again and taken away."""
        y1, y2 = y[..., : self.sizes[0]], y[..., self.sizes[0] :]
        x2 = y2 - self.g(y1).to(y.dtype)
        return torch.cat((y1 - self.f(x2).to(y.dtype), x2), dim=-1)


class AffineCoupling(nn.Module):
    """y₁ = e(s₂) ⊙ x₁ + t₂, y₂ = e(s₁) ⊙ x₂ + t₁, with [s₂ ; t₂] = F(x₂), [s₁ ; t₁] = G(y₁) and log e(s) = `log_e`."""

    def __init__(self, width: int, method: Any, site: Site) -> None:
        super().__init__()
        first, last = self.sizes = width // 2, width - width // 2
        divided = [max(1, int(size // method.reduction_factor)) for size in self.sizes]
        self.f = Bottleneck(last, divided[1], 2 * first, method, site)
        self.g = Bottleneck(first, divided[0], 2 * last, method, site)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x[..., : self.sizes[0]], x[..., self.sizes[0] :]
        s2, t2 = self.f(x2).chunk(2, dim=-1)
        y1 = torch.addcmul(t2.to(x.dtype), log_e(s2).exp().to(x.dtype), x1)
        s1, t1 = self.g(y1).chunk(2, dim=-1)
        return torch.cat((y1, torch.addcmul(t1.to(x.dtype), log_e(s1).exp().to(x.dtype), x2)), dim=-1)

    def inverse(self, y: Tensor) -> Tensor:
        """x with `forward(x)` = y, to rounding: what was added is taken away, and what multiplied divides."""
        y1, y2 = y[..., : self.sizes[0]], y[..., self.sizes[0] :]
        s1, t1 = self.g(y1).chunk(2, dim=-1)
        x2 = (y2 - t1.to(y.dtype)) * (-log_e(s1)).exp().to(y.dtype)
        s2, t2 = self.f(x2).chunk(2, dim=-1)
        return torch.cat(((y1 - t2.to(y.dtype)) * (-log_e(s2)).exp().to(y.dtype), x2), dim=-1)


def log_e(s: Tensor) -> Tensor:
    """c · 0.636 · atan(s / c), c = 5: 0.636 s near zero, and never beyond ±c (0.636 < 2 / π)."""
    return CLAMP * 0.636 * torch.atan(s / CLAMP)


COUPLINGS: dict[str, type[Coupling] | type[AffineCoupling]] = {"nice": Coupling, "glow": AffineCoupling}


class CouplingPiece(Piece):
    """What goes into a place, turned by the network; one of the pieces of a model owns it."""

    def __init__(self, coupling: Coupling | AffineCoupling, owns: bool) -> None:
        super().__init__()
        self.coupling = coupling
        self.owns = owns

    def turned(self, x: Tensor) -> Tensor:
        """What the place gets in the stead of x."""
        y: Tensor = self.coupling(x)
        return y

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            return inner(self.turned(args[0]), *args[1:], **kwargs)
        name = next(iter(kwargs))
        return inner(**{**kwargs, name: self.turned(kwargs[name])})

    def file_tensors(self) -> dict[str, Tensor]:
        return super().file_tensors() if self.owns else {}


class InversePiece(CouplingPiece):
    """The same backwards."""

    def turned(self, x: Tensor) -> Tensor:
        return self.coupling.inverse(x)
