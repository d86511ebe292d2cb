"""`pack`: a second copy of a bf16 model's weights, in the order in which the processor's kernels read them fastest.

    inlay.pack(model)
    model.generate(**prompt)        # a token at a time, a linear takes 0.4 of the time

A product of few rows takes as long as reading W, and oneDNN reads a reordered W (blocks for its inner loops) faster
than one stored row by row: in 0.4 of the time for 1 to 4 rows, 0.7 for 16, 0.9 for 128. The same numbers are multiplied
and summed in the same order, so outputs keep their bits (but for a strided x of three dimensions and a frozen W,
which torch multiplies in another way: it copies W for each of the first).

FLOPs: 2 T in out. Bytes: 2 in out read a call, and 2 in out kept. Equal to torch.nn.functional.linear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.engine.adapters import ATTRIBUTE, Adapters, base_model, find_adapters
from inlay.engine.host import base_class, close_host, hosts, inlays_of, open_host
from inlay.errors import TargetError, UnsupportedError
from inlay.kernels.choice import compute_dtype, fusible

if TYPE_CHECKING:
    from inlay.engine.host import Inlays

MOST_ROWS = 128
"""With more rows, reading W weighs too little."""


def pack(model: nn.Module, on: bool = True) -> nn.Module:
    """Keep every bf16 linear's weight a second time, packed for few rows at inference on a CPU; returns the same model.

    Takes as many bytes again as these weights. They are packed at their first call, and again when a weight changes;
    outputs keep their bits. `on=False`, and `detach` of the last adapter, give the memory back.

    Raises UnsupportedError where the processor has no bf16, TargetError when the model has no bf16 linear on the CPU.
    """
    if not on:
        adapters = find_adapters(model)
        if adapters is not None:
            unpack(base_model(model), adapters)
        return model
    base = base_model(model)
    linears = [module for module in base.modules() if suits(module)]
    if not linears:
        raise TargetError(
            f"pack: {type(base).__name__} has no linear in bfloat16 on the CPU: load it there, with dtype=bfloat16"
        )
    why = missing()
    if why is not None:
        raise UnsupportedError(f"pack: {why}")
    adapters = base.__dict__.setdefault(ATTRIBUTE, find_adapters(base) or Adapters(base))
    for module in linears:
        inlays = open_host(module, adapters.state, transposed=False)
        if inlays.own_forward is None:
            inlays.take_few_rows(FewRows())
        elif not inlays._modules:
            close_host(module)
    return model


def suits(module: nn.Module) -> bool:
    """Whether this is a plain linear with a bf16 weight on the CPU."""
    if base_class(type(module)).forward is not nn.Linear.forward:
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


def unpack(model: nn.Module, adapters: Adapters) -> None:
    """Forget all packed weights; modules that hold nothing else become what they were."""
    for _, module, inlays in [*hosts(model)]:
        inlays.take_few_rows(None)
        if inlays.empty:
            close_host(module)
    if not adapters.loaded:
        del model.__dict__[ATTRIBUTE]


class FewRows:
    """A linear's `forward` with its weight packed, as long as that is what the call wants."""

    most_rows = MOST_ROWS

    def __init__(self) -> None:
        self._state: tuple[Tensor, int] | None = None
        self._packed: Tensor | None = None

    def __call__(self, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The base's output: by `kernels.packed` for few rows without gradients, by its own `forward` otherwise."""
        if len(args) == 1 and not kwargs and wanted(args[0]):
            inlays = inlays_of(host)
            assert inlays is not None
            weight = self.packed(inlays)
            if weight is not None:
                return product(args[0], weight, inlays.bias_value())
        return base_class(type(host)).forward(host, *args, **kwargs)

    def packed(self, inlays: Inlays) -> Tensor | None:
        """The weight as it is now, packed; None while a piece stands for it, or no version tells of its changes."""
        weight = inlays.original("weight")
        if inlays.value("weight", weight) is not weight or not suits(inlays.host) or weight.is_inference():
            return None
        state = (weight, weight._version)
        if self._packed is None or self._state is None or self._state[0] is not weight or self._state[1] != state[1]:
            self._state, self._packed = state, reordered(weight)
        return self._packed

    def __getstate__(self) -> dict[str, Any]:  # opaque to pickle; a copy packs its own weight
        return {"_state": None, "_packed": None}


def wanted(x: Any) -> bool:
    """Whether a linear is called with few rows of bf16 on the CPU, without gradients, and not by a tracer."""
    if torch.is_grad_enabled() or not isinstance(x, Tensor) or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return False
    few = x.dim() > 0 and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
    return few and fusible(x) and compute_dtype(x) == torch.bfloat16


# -- the product -------------------------------------------------------------------------------------------------------


def missing() -> str | None:
    """Why this cannot be had here; None where it can."""
    here: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not here or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bf16 instructions that oneDNN uses"
    return None


def reordered(weight: Tensor) -> Tensor:
    """W (out, in) in bf16, reordered: opaque, for `product` only."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)
    return packed


def product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b for x (…, in) in bf16; no gradients."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return y.view(*x.shape[:-1], -1)
