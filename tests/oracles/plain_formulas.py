"""Plain formulas that the kernels must equal, what a graph keeps, and a small network to put adapters in."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.kernels import dropout, low_rank

SCALE = 0.7
"""No power of two, so that rounding it, or leaving it out, shows."""


def same_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """x ⊙ m in torch's own operations."""
    if mask is None:
        return x
    ones = mask if mask.dtype == torch.bool else dropout.unpack(mask, x.shape)
    return x * ones.to(x.dtype)


def lora(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """x Wᵀ + b + s · x̃ Aᵀ Bᵀ."""
    return F.linear(x, weight, bias) + SCALE * low_rank.linear(same_mask(x, mask), a, b)


def dora(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, magnitude: Tensor, mask: Tensor | None = None
) -> Tensor:
    """m / ‖W + s B A‖ ⊙ (x Wᵀ + s · x̃ Aᵀ Bᵀ) + b, the norm a constant."""
    norms = (weight + SCALE * b @ a).detach().norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
    y = magnitude / norms * (F.linear(x, weight) + SCALE * low_rank.linear(same_mask(x, mask), a, b))
    return y if bias is None else y + bias


def gradients(y: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Of a fixed weighted sum of y, for those tensors that require gradients."""
    weights = torch.linspace(-1, 1.3, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return list(torch.autograd.grad(y, wanted, weights))


def leaf(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    """Normal values, scaled so that products with them keep the size of x."""
    return (torch.randn(*shape, dtype=dtype) / math.sqrt(shape[-1])).requires_grad_(grad)


def twin(t: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """The same values as a leaf of its own, in the precision of an oracle."""
    return None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)


def close(found: Tensor, truth: Tensor, roundings: float = 4, dtype: torch.dtype | None = None) -> None:
    """Within that many roundings (in `dtype`, or that of `found`) of the largest entry, which is what sums lose."""
    found, truth = found.detach(), truth.detach()
    assert found.shape == truth.shape
    assert found.isfinite().all()
    if truth.numel():
        error = float((found.double() - truth.double()).abs().max())
        bound = roundings * torch.finfo(dtype or found.dtype).eps * float(truth.abs().max())
        assert error <= bound, f"error {error:.3g} is more than {bound:.3g}"


@contextlib.contextmanager
def kept(*apart: Tensor) -> Iterator[list[Tensor]]:
    """What autograd saves inside, less tensors that share memory with `apart`: one for each distinct memory."""
    seen = {t.untyped_storage().data_ptr() for t in apart}
    found: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in seen:
            seen.add(t.untyped_storage().data_ptr())
            found.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def size(tensors: list[Tensor]) -> int:
    """Bytes of their memory."""
    return sum(t.untyped_storage().nbytes() for t in tensors)


class Net(nn.Module):
    """Two linears that read one x, and a third that reads what comes of them."""

    def __init__(self, width: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(width, 8, bias=bias)
        self.gate = nn.Linear(width, 8, bias=bias)
        self.last = nn.Linear(8, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.first(x)) * self.gate(x))
        return result


TARGETS = "first,gate,last"


def method(kind: str, **fields: Any) -> inlay.Method:
    """A method on all of `Net`, with a scale that is no power of two."""
    fields = {"targets": TARGETS, **fields}
    if kind == "ia3":
        return inlay.IA3(feedforward=("last",), **fields)
    cls = inlay.LoRA if kind == "lora" else inlay.DoRA
    return cls(r=3, alpha=2.1, **fields)


def attached(kind: str, base: nn.Module | None = None, name: str = "default", **fields: Any) -> nn.Module:
    """`Net`, or another model, with an adapter whose every tensor matters, in training mode."""
    model = inlay.attach(Net() if base is None else base, method(kind, **fields), name=name).train()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(len(name))
        for parameter in adapters_of(model).get(name).parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:  # a magnitude: keeps its sign, since far from ‖V‖ is a matter of its own
                parameter.mul_((0.2 * noise).exp())
            else:
                parameter.add_(noise * 0.3)
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of all that trains (and of x where it requires them)."""
    y = model(x)
    return y, gradients(y, *trained(model).values(), x)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Inside, every method takes its plain formula."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("kernels.lora", "kernels.scaling", "methods.dora"):
            patch.setattr(f"inlay.{module}.fusible", lambda *tensors: False)
        yield


ROUNDINGS = 32
"""Three linears in a row, forward and backward, each a few sums."""


def same(model: nn.Module, x: Tensor, roundings: float = ROUNDINGS, dtype: torch.dtype | None = None) -> None:
    """Fused and plain agree in output and all gradients, and in the dtypes of both."""
    y, found = step(model, x)
    with plainly():
        truth, expected = step(model, x)
    assert y.dtype == truth.dtype
    close(y, truth, roundings, dtype)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        close(one, other, roundings, dtype or y.dtype)


def nodes(y: Tensor) -> list[str]:
    """Names of the graph behind y."""
    seen, queue = set(), [y.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [after for after, _ in node.next_functions]
    return [node.name() for node in seen]


def fused(y: Tensor) -> int:
    """How many of the functions made y."""
    return sum(node.removesuffix("Backward") in ("LowRankLinear", "AddLowRank", "MagnitudeLinear") for node in nodes(y))
