"""What a host computes when it is x Wᵀ + b and nothing else: the ground on which a fused kernel may stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from inlay.engine.host import Inlays

PLAIN = (Tensor, nn.Parameter)
FOUR_BIT_ROWS = 8
"""Up to so many rows, bitsandbytes' own kernel for decoding token by token beats values and a product."""
Decode = Callable[[Tensor, torch.dtype], Tensor]
"""Gives the values of a quantised weight, (out, in)."""


class Linear(NamedTuple):
    """W (out, in) and b (out), as they read now; a quantised W with the function that gives its values."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    """In which it computes outside autocast."""
    decode: Decode | None = None
    few_rows: int = 0
    """At inference, the host's own call is faster for up to so many rows of x."""


def plain_linear(inlays: Inlays) -> Linear | None:
    """The host as a `Linear`; None for other modules, for subclasses with a forward of their own, and for weights that
    are not plain tensors (DTensor, parametrised), where the host had better be called.
    """
    host = inlays.host
    forward: Any = type(host)._inlay_base.forward  # type: ignore[attr-defined]
    if forward.__module__.startswith("bitsandbytes.") and forward.__qualname__ == "Linear4bit.forward":
        return _four_bit(inlays)
    if forward is not nn.Linear.forward and not (inlays.transposed and forward.__qualname__ == "Conv1D.forward"):
        return None
    stored = host._parameters.get("weight")
    if type(stored) not in PLAIN or host._parameters.get("bias", stored).__class__ not in (*PLAIN, type(None)):
        return None
    weight = inlays.value("weight", inlays.original("weight"))
    few_rows = 0 if inlays.few_rows is None else inlays.few_rows.most_rows
    return Linear(weight.t() if inlays.transposed else weight, inlays.bias_value(), weight.dtype, None, few_rows)


def _four_bit(inlays: Inlays) -> Linear | None:
    """bitsandbytes' 4-bit linear; None once its weight is packed for its own inference kernel."""
    host: Any = inlays.host
    weight = inlays.original("weight")
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    if inlays.value("weight", weight) is not weight:
        return None
    return Linear(weight, inlays.bias_value(), host.compute_dtype or state.dtype, _dequantise, FOUR_BIT_ROWS)


def _dequantise(weight: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return values.to(dtype)
