"""What the methods share that multiply: y = W (M x) + b, by acting on x, so that nothing of W's size is formed.

A piece says how M acts on rows (`turned`). Merged, W becomes W M: the rows of W are turned by Mᵀ. Of two adapters the
one activated first is the innermost, next to W: x goes through the second first, and merged they are W M₁ M₂.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.engine.piece import Method, Piece, trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.kernels.choice import compute_dtype, without_autocast


class InputRotation(Piece):
    """x becomes M x before the base sees it."""

    def __init__(self, method: Method, site: Site) -> None:
        super().__init__()
        self.size = math.prod(site.weight.shape[1:]) if site.kind == "conv" else site.in_features
        self.kind = site.kind
        self.place: dict[str, Any] = {"dtype": trainable_dtype(site.dtype), "device": site.device}

    def turned(self, x: Tensor, inverse: bool = False) -> Tensor:
        """The rows of x (…, in) times Mᵀ; `inverse`: times M, which undoes it where M is orthogonal."""
        raise NotImplementedError

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.kind == "linear":
            x = x.to(compute_dtype(x))
            with without_autocast(x):
                x = self.turned(x)
            return inner(x)
        # Windows overlap, so a rotation of each is none of x; the kernel is turned instead, which is smaller than x.
        bias = self.bias(inner.bias())
        weight = self.weight(inner.weight()).to(x.dtype)
        return inner.module._conv_forward(x, weight, None if bias is None else bias.to(x.dtype))

    def weight(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1).to(torch.promote_types(weight.dtype, self.place["dtype"]))
        return self.turned(rows, inverse=True).view(weight.shape)


def only_square_kernels(method: Method, sites: Sequence[Site]) -> None:
    """Raise UnsupportedError for a convolution that HF peft's multiplicative methods compute wrongly, or not at all."""
    for site in sites:
        module: Any = site.module
        if site.kind != "conv" or (
            module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and set(module.dilation) == {1}
            and all(len(set(sizes)) == 1 for sizes in (module.kernel_size, module.stride, module.padding))
        ):
            continue
        which = "convolutions with square kernels, one group and no dilation only"
        raise UnsupportedError(f"HF peft has {type(method).__name__} on {which}; {site.name} is another")


def nearest_divisor(wanted: int, size: int, what: str) -> int:
    """The divisor of `size` nearest to the number wanted, the smaller of two, as in HF peft; with a warning where it is
    another number. 1 is refused.
    """
    found = min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - wanted), n))
    if found == 1:
        raise ConfigError(f"{what}: no divisor of {size} but 1 is near {wanted}, and a block of one cannot turn")
    if found != wanted:  # without the place, so that Python shows one of all places of this size
        warnings.warn(f"{what.split(maxsplit=1)[0]}: {wanted} does not divide {size}; {found} is taken", stacklevel=2)
    return found
