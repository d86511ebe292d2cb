"""Five supports of a weight and a bias, each a product, a vector or a number: W + W ⊙ A + B, b + b ⊙ D + E + W C."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.kernels import dense
from inlay.pieces.linear import DeltaPiece


class GLoRAPiece(DeltaPiece):
    """Xd, Xu or X of each of A to E, by HF peft's names."""

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        (o, i), weight = self.shape, site.module._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            raise UnsupportedError(f"GLoRA cannot sit at {site.name}: it needs W, and W is quantised or parametrised")
        if method.weights == "none" and (site.bias is None or method.coupling == method.biases == "none"):
            raise ConfigError(f"GLoRA has nothing to train at {site.name}")
        self._base = (site.module,)  # in a tuple, or it would be one of this module's own
        self.transposed = site.transposed
        sizes = {"A": (o, i), "B": (o, i), "C": (i, 1), "D": (o,), "E": (o,)}
        forms = dict.fromkeys("AB", method.weights)
        if site.bias is not None:
            forms |= {"C": method.coupling, "D": method.biases, "E": method.biases}
        for letter, size in sizes.items():
            self.add_module(f"glora_{letter}", self.made(forms.get(letter, "none"), size, method.r))
        self.sizes = tuple(sizes.items())

    def made(self, form: str, size: tuple[int, ...], r: int) -> nn.ParameterDict:
        """The tensors for one of the five."""
        if form == "lora":
            return nn.ParameterDict({"Xd": self.start(size[0], r, value=0.0), "Xu": self.start(r, size[1])})
        shape = {"vector": (size[0], 1) if len(size) == 2 else size, "constant": (1,)}.get(form)
        return nn.ParameterDict({} if shape is None else {"X": self.start(*shape, value=0.0)})

    def part(self, letter: str) -> nn.ParameterDict:
        """The tensors of one of the five."""
        return cast(nn.ParameterDict, self._modules[f"glora_{letter}"])

    def of(self, letter: str) -> Tensor | None:
        """One of the five, in a shape that spreads to its own."""
        part = self.part(letter)
        return cast(Tensor, part["Xd"] @ part["Xu"]) if "Xd" in part else part.get("X")

    def base(self) -> tuple[Tensor, Tensor | None]:
        """The W (out, in) and b of the base, whatever else is attached."""
        (host,) = self._base
        weight, bias = host._parameters["weight"], host._parameters.get("bias")
        assert weight is not None
        return weight.t() if self.transposed else weight, bias

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if "Xd" in self.part("A"):
            y = dense.changed(inner, x, self.form, [*self.part("A").values(), *self.part("B").values()])
        else:
            y, a, b = inner(x), self.of("A"), self.of("B")
            if a is not None and b is not None:
                shares = F.linear(x, self.base()[0].to(x.dtype)) * a.flatten()
                y = y + (shares + x.sum(-1, keepdim=True) * b.flatten()).to(y.dtype)
        shift = self.shift()
        return y if shift is None else y + shift.to(y.dtype)

    def form(self, *tensors: Tensor) -> Tensor:
        a_down, a_up, b_down, b_up = tensors
        return self.base()[0] * (a_down @ a_up) + b_down @ b_up

    def shift(self) -> Tensor | None:
        """b ⊙ D + E + W C; None without a bias."""
        weight, bias = self.base()
        c, d, e = (self.of(letter) for letter in "CDE")
        shift = None if c is None else (weight @ c.to(weight.dtype)).flatten()
        if bias is None or d is None or e is None:
            return shift
        return bias * d + e if shift is None else bias * d + e + shift

    def delta(self) -> Tensor:
        weight, a, b = self.base()[0], self.of("A"), self.of("B")
        return torch.zeros_like(weight) if a is None or b is None else weight * a + b

    def bias(self, bias: Tensor | None) -> Tensor | None:
        shift = self.shift()
        return bias if bias is None or shift is None else bias + shift

    def file_tensors(self) -> dict[str, Tensor]:
        """With HF peft's zeros for what is absent."""
        found = super().file_tensors()
        for letter, size in self.sizes:
            if not self.part(letter):
                found[f"glora_{letter}.zeros"] = torch.zeros(size, device=self.place["device"])
        return found
