"""The bottleneck network of adapters, and the pieces that set it after a place, on a norm, or beside a sub-layer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import UnsupportedError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "identity": lambda x: x,
}
INITS = ("zero_up", "bert", "houlsby")


@dataclasses.dataclass(frozen=True)
class BottleneckFields:
    """What `Bottleneck` reads of a method, for methods whose own fields are others."""

    activation: str
    dropout: float = 0.0
    scale: float = 1.0
    init: str = "bert"


class Bottleneck(nn.Module):
    """A(x) = s · (W_up f(W_down x + b_down) + b_up), with W_down (m, in) and W_up (out, m)."""

    def __init__(self, into: int, width: int, out: int, method: Any, site: Site) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": trainable_dtype(site.dtype), "device": site.device}
        self.down = self.layer(into, width, method, place)
        self.up = self.layer(width, out, method, place)
        self.activation = method.activation
        self.dropout = method.dropout
        self.scale: float = method.scale
        self.hidden: Tensor | None = None
        """Between the two places of a pair: what `narrow` gave, waiting for `widen`."""
        self._start(method.init)

    def layer(self, into: int, out: int, method: Any, place: dict[str, Any]) -> Any:
        """What W_down and W_up are; `project` multiplies by it."""
        return nn.Linear(into, out, **place)

    def project(self, layer: Any, x: Tensor) -> Tensor:
        """W x + b, in the dtype of x."""
        return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))

    @torch.no_grad()
    def _start(self, init: str) -> None:
        for linear in (self.down, self.up):
            linear.bias.zero_()
            if init == "bert":
                linear.weight.normal_(std=0.02)
            elif init == "houlsby":
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
        if init == "zero_up":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            self.up.weight.zero_()

    def narrow(self, x: Tensor) -> Tensor:
        """f(W_down x + b_down), (…, m)."""
        z = self.project(self.down, x)
        return F.dropout(ACTIVATIONS[self.activation](z), self.dropout, self.training)

    def widen(self, z: Tensor) -> Tensor:
        """s · (W_up z + b_up), (…, out)."""
        return self.scale * self.project(self.up, z)

    def forward(self, x: Tensor) -> Tensor:
        return self.widen(self.narrow(x))


class AdapterPiece(Piece):
    """A piece with a bottleneck; a pair of places shares one."""

    def __init__(self, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck


class AfterPiece(AdapterPiece):
    """h + A(h)."""

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        return first_of(inner(*args, **kwargs), lambda h: h + self.bottleneck(h).to(h.dtype))


class BesidePiece(AdapterPiece):
    """h + A(x)."""

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        return first_of(inner(*args, **kwargs), lambda h: h + self.bottleneck(x).to(h.dtype))


class TwicePiece(AdapterPiece):
    """LN(t + A(LN(t))): on the norm that follows a residual addition."""

    def forward(self, inner: Any, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        return inner(t + self.bottleneck(inner(t, *args, **kwargs)).to(t.dtype), *args, **kwargs)


class ScopePiece(AdapterPiece):
    """Around the module that holds both places of a pair: whatever ends its call, nothing is left waiting.

    (A checkpoint that is recomputed stops as soon as it has what it needs, which may be between the two places.)
    """

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        finally:
            self.bottleneck.hidden = None

    def file_tensors(self) -> dict[str, Tensor]:
        return {}


class EnterPiece(AdapterPiece):
    """On the first projection: f(W_down x) is formed from its input."""

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.bottleneck.hidden = self.bottleneck.narrow(x)
        return inner(x, *args, **kwargs)

    def file_tensors(self) -> dict[str, Tensor]:
        return {}


class LeavePiece(AdapterPiece):
    """On the second projection: h + s · W_up of what the first place formed."""

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        h = inner(*args, **kwargs)
        hidden, self.bottleneck.hidden = self.bottleneck.hidden, None
        if hidden is None:
            raise UnsupportedError(
                "a parallel adapter's second projection was called without its first: adapt the module that holds "
                "both, as in Adapter(placement='parallel', targets=...)"
            )
        return h + self.bottleneck.widen(hidden).to(h.dtype)


def paired(bottleneck: Bottleneck, holder: Site, first: Site, last: Site) -> list[tuple[Site, Piece]]:
    """The pieces that carry one bottleneck from a feed-forward network's first projection to its second."""
    return [(holder, ScopePiece(bottleneck)), (first, EnterPiece(bottleneck)), (last, LeavePiece(bottleneck))]


def first_of(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`output` with `change` applied to it, or to its first entry where a module returns several."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)
