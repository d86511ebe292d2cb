"""Reversible stacks: the paper's formula by hand, on BERT's own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from engine.tiny import build
from torch import Tensor

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.registry import make_method


def adapter(tensors: dict[str, Tensor], path: str) -> Callable[[Tensor], Tensor]:
    """W_up gelu(W_down x + b_down) + b_up, from the tensors of one place."""
    down, up = ([tensors[f"{path}.{name}.{kind}"] for kind in ("weight", "bias")] for name in ("down", "up"))
    return lambda x: F.linear(F.gelu(F.linear(x, *down)), *up)


def stack(base: Any, tensors: dict[str, Tensor], x: Tensor, variant: int) -> Tensor:
    """The mean of both streams after the last layer."""
    lambda_, beta = {1: (0.1, 1.0), 2: (1.0, 0.1), 3: (0.1, 0.1)}[variant]
    x1 = x2 = x
    for number, layer in enumerate(base.encoder.layer):
        path, out = f"encoder.layer.{number}", layer.attention.output
        beside = adapter(tensors, f"{path}.output.dense.bottleneck")

        def attend(h: Tensor, layer: Any = layer, out: Any = out, path: str = path) -> Tensor:
            s = out.dense(layer.attention.self(h)[0])
            if variant == 3:
                s = s + adapter(tensors, f"{path}.attention.output.dense.bottleneck")(s)
            return out.LayerNorm(s + h)  # type: ignore[no-any-return]

        def feed(h: Tensor, layer: Any = layer, beside: Any = beside) -> Tensor:
            return layer.output.LayerNorm(layer.output.dense(layer.intermediate(h)) + beside(h) + h)  # type: ignore[no-any-return]

        if variant == 3:
            y1 = lambda_ * x1 + attend(x2)
            x1, x2 = y1, beta * x2 + feed(y1)
            continue
        network = adapter(tensors, f"{path}.network")
        y1 = lambda_ * x1 + (feed(attend(x2)) if variant == 1 else network(x2))
        x1, x2 = beta * x2 + (network(y1) if variant == 1 else feed(attend(y1))), y1
    return (x1 + x2) / 2


def by_hand(kind: str, variant: int = 1) -> tuple[Tensor, Tensor]:
    """What the library computes, and what the formula does."""
    base: Any = build("bert")
    model = inlay.attach(copy.deepcopy(base), make_method(kind, {"bottleneck": 3, "variant": variant}))
    for parameter in adapters_of(model).get("default").parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    pieces = adapters_of(model).get("default").pieces()
    tensors = {f"{site.path}.{name}": t for site, piece in pieces for name, t in piece.named_parameters()}
    ids = torch.randint(3, 60, (2, 5))
    with torch.no_grad():
        return model(ids).last_hidden_state, stack(base, tensors, base.embeddings(ids), variant)
