"""Models with LoRA, each twice: as it is, and fused; and what tells that they compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from engine import tiny
from oracles.plain_formulas import attached, close, nodes, trained
from torch import Tensor, nn

import inlay

IDS = torch.arange(2, 22).reshape(2, 10)
MANY = 4096
"""Roundings that two layers of a transformer may add up to; in float64 that is 1e-12."""


def decoder(name: str = "llama", dtype: torch.dtype = torch.float64, targets: str = "all-linear", **fields: Any) -> Any:
    """A tiny causal model in training mode, its biases not zero."""
    base = tiny.build(name, "causal").to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in base.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_()
    return attached("lora", base, targets=targets, **fields)


def logits(model: Any) -> Tensor:
    """Of a fixed batch, without the cache."""
    result: Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


def outcome(model: nn.Module, run: Callable[[Any], Tensor] = logits, seed: int = 7) -> dict[str, Tensor]:
    """The output, and the gradient of all that trains and got one, by name."""
    torch.manual_seed(seed)
    y = run(model)
    loss = (y * torch.linspace(-1, 1.3, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()
    parameters = trained(model)
    loss.backward()  # not autograd.grad, which reentrant checkpointing refuses
    named = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return {"output": y.detach(), **named}


def alike(found: dict[str, Tensor], truth: dict[str, Tensor], roundings: float = MANY) -> None:
    """The same output and gradients, and gradients of the same parameters; to the bit where `roundings` is 0."""
    assert found.keys() == truth.keys()
    assert len(truth) > 1
    for name, expected in truth.items():
        assert found[name].dtype == expected.dtype
        if roundings:
            close(found[name], expected, roundings)
        else:
            assert torch.equal(found[name], expected), name


def pair(model: Any, **ways: Any) -> tuple[Any, Any]:
    """The model as it is, and a copy of it, fused."""
    return model, inlay.fuse(copy.deepcopy(model), **ways)


def checkpoint_blocks(model: Any, reentrant: bool) -> None:
    """Ask transformers to, by either of the names it has had for this."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def count(y: Tensor, function: str) -> int:
    """How many of these functions lie behind y."""
    return sum(node == f"{function}Backward" for node in nodes(y))


class Family(nn.Module):
    """Three linears that may read one x, called as `body` likes."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def attention(family: Any, x: Tensor) -> Tensor:
    """What they are called for as a rule."""
    q, k, v = family.q(x), family.k(x), family.v(x)
    return q * torch.tanh(k) + v


def family(body: Callable[[Any, Tensor], Tensor] = attention, **fields: Any) -> Any:
    """Such a module with LoRA on all three."""
    return attached("lora", Family(body).double(), targets="q,k,v", **fields)


def siblings(model: Any, **ways: Any) -> tuple[Any, Any]:
    """The module as it is, and a copy that has learned who shares."""
    plain, fused = pair(model, mlp=False, siblings=True, **ways)
    fused(X)
    return plain, fused


X = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(2, 4, 6)


class GatedNetwork(nn.Module):
    """SwiGLU by the names that are looked for."""

    def __init__(self, dtype: torch.dtype = torch.float64, act_fn: Any = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(6, 8, dtype=dtype)
        self.up_proj = nn.Linear(6, 8, dtype=dtype)
        self.down_proj = nn.Linear(8, 6, dtype=dtype)
        self.act_fn = nn.SiLU() if act_fn is None else act_fn

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return result
