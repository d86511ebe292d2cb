"""A change of a weight that depends on the weight itself: ΔW = f(θ, W). Under the onion, W is what lies inside."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from inlay.engine.piece import Method
from inlay.engine.sites import Site
from inlay.errors import UnsupportedError
from inlay.kernels import dense
from inlay.pieces.linear import DeltaPiece


class RelativePiece(DeltaPiece):
    """ΔW is formed by `form(*parameters, W)`, with W (out, in); for convolutions, in is channels times kernel."""

    def __init__(self, method: Method, site: Site) -> None:
        weight = site.module._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            stored = "quantised" if weight is not None else "parametrised"
            what = type(method).__name__
            raise UnsupportedError(f"{what} cannot sit at {site.name}: it needs W, and W is {stored}; use LoRA there")
        super().__init__(method, site)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rate, weight = self.dropout if self.training else 0.0, inner.weight()
        if self.kind == "linear" and not rate:
            return dense.changed(inner, x, self.form, [*self.parameters(), weight])
        y, dropped, delta = inner(x), F.dropout(x, rate) if rate else x, self.change(weight).to(x.dtype)
        host = inner.module
        return y + (F.linear(dropped, delta) if self.kind == "linear" else host._conv_forward(dropped, delta, None))

    def change(self, weight: Tensor) -> Tensor:
        """ΔW in the shape of W."""
        return self.form(*self.parameters(), weight.flatten(1)).view(weight.shape)

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.change(weight)
