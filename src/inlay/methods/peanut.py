"""PEANuT: adaptation with weight-aware neural tweakers (Zhong et al. 2024, arXiv:2410.01870).

    W′ = W + s · B z,     z = f(A W)

The change is what a small network makes of W itself, of rank r at most: it runs as a LoRA whose first factor is z
(r, in). With a depth, as many layers f(E z) follow, and then as many f(D z), each of which gets the input of its
counterpart added. B starts at zero, so the model starts as the base. W is what lies inside: of two adapters the outer
one reads what the inner one made of W.

Parameters: 2 r out, and 2 depth r².
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.kernels import lora as kernel
from inlay.pieces.bottlenecks.bottleneck import ACTIVATIONS
from inlay.pieces.linear import LinearMethod, named
from inlay.pieces.relative import RelativePiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class PEANuT(LinearMethod):
    """W + s · B f(A W): the change is a small network's, whose input is the weight."""

    kind = "peanut"
    default_targets = "query,value"
    peft_type = "PEANUT"
    paper = "Zhong et al. 2024, arXiv:2410.01870"
    peft_conv1d = False

    r: int = named("r", 32)
    """Width of the network, and the largest rank of the change."""
    depth: int = named("depth", 0)
    """Layers between A and B, on each side of the middle."""
    act_fn: str = named("act_fn", "relu")
    """f: relu, gelu, silu, swish, tanh or leaky_relu."""
    scaling: float = named("scaling", 1.0)
    """s."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_whole("depth", least=0)
        self.check_number("scaling")
        self.check_choice("act_fn", [name for name in ACTIVATIONS if name != "identity"])

    def piece(self, site: Site) -> Piece:
        return PEANuTPiece(self, site)


class PEANuTPiece(RelativePiece):
    """A (r, out), B (out, r) and the layers between (r, r), by HF peft's names."""

    def __init__(self, method: PEANuT, site: Site) -> None:
        super().__init__(method, site)
        out, r = self.shape[0], method.r
        self.scale, self.act_fn = method.scaling, method.act_fn
        self.peanut_A = nn.Linear(out, r, bias=False, **self.place)
        self.peanut_B = nn.Linear(r, out, bias=False, **self.place)
        nn.init.zeros_(self.peanut_B.weight)
        layers = [nn.ModuleList(nn.Linear(r, r, bias=False, **self.place) for _ in range(method.depth)) for _ in "ED"]
        self.peanut_encoders, self.peanut_decoders = layers

    def factor(self, weight: Tensor) -> Tensor:
        """z (r, in)."""
        activation, first = ACTIVATIONS[self.act_fn], self.peanut_A.weight
        z = activation((first.to(weight.dtype) @ weight).to(first.dtype))
        inputs = []
        for layer in self.peanut_encoders:
            inputs.append(z)
            z = activation(layer.get_parameter("weight") @ z)
        for layer in self.peanut_decoders:
            z = activation(layer.get_parameter("weight") @ z) + inputs.pop()
        return z

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return kernel.adapted(inner, x, self.factor(inner.weight()), self.peanut_B.weight, self.scale)

    def change(self, weight: Tensor) -> Tensor:
        return self.scale * (self.peanut_B.weight @ self.factor(weight))
