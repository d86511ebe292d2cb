"""Adapters beyond the bottleneck: their formulas, from the tensors that they train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from engine.tiny import build
from torch import Tensor
from transformers import DynamicCache

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.registry import make_method

FIELDS: dict[str, dict[str, Any]] = {
    "adapter_plus": {"bottleneck": 3},
    "compacter": {"n": 2, "r": 2, "bottleneck": 4, "train_norms": False, "shared_rule": False},
    "mam": {"num_virtual_tokens": 3, "projection_size": 8, "bottleneck": 3},
    "reft": {"r": 2, "first": 2, "last": 1},
    "unipelt": {"r": 2, "num_virtual_tokens": 3, "projection_size": None, "bottleneck": 3},
    "vl_pet": {"r": 3, "gate_r": 2},
}
UNTARGETED = ("mam", "reft", "unipelt")
SYMBOLS = {"compacter": {"m": 4, "n": 2}}
AFTER = {"compacter", "adapter_plus"}
"""Those that sit at a place as a whole, on what came out of it."""


def sums_of_products(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return sum((torch.kron(a, s @ t) for a, s, t in zip(rule, left, right, strict=True)), torch.zeros(()))


def compacter(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    rule = t["bottleneck_rule_a"]
    down = sums_of_products(rule, t["bottleneck_down_factors_0"], t["bottleneck_down_factors_1"])
    up = sums_of_products(rule, t["bottleneck_up_factors_0"], t["bottleneck_up_factors_1"])
    hidden = F.gelu(h @ down + t["bottleneck_down_bias"], approximate="tanh")
    return h + hidden @ up + t["bottleneck_up_bias"]


def adapter_plus(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    hidden = F.gelu(F.linear(h, t["bottleneck_down_weight"], t["bottleneck_down_bias"]))
    return h + t["bottleneck_gain"] * F.linear(hidden, t["bottleneck_up_weight"], t["bottleneck_up_bias"])


def invertible(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    def network(name: str, half: Tensor) -> Tensor:
        hidden = F.relu(F.linear(half, t[f"coupling_{name}_down_weight"], t[f"coupling_{name}_down_bias"]))
        return F.linear(hidden, t[f"coupling_{name}_up_weight"], t[f"coupling_{name}_up_bias"])

    first, last = x.split(3, dim=-1)
    first = first + network("f", last)
    return F.linear(torch.cat((first, last + network("g", first)), dim=-1), w, b)


def vl_pet(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    def network(name: str, x: Tensor) -> Tensor:
        down = F.linear(x, t[f"bottleneck_{name}_down_weight"], t[f"bottleneck_{name}_down_bias"])
        hidden = F.gelu(down, approximate="tanh")
        return F.linear(hidden, t[f"bottleneck_{name}_up_weight"], t[f"bottleneck_{name}_up_bias"])

    h = F.linear(x, w, b)
    return torch.sigmoid(network("gate", x)) * (h + network("adapter", h))


FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "adapter_plus": ("x + s ⊙ (W_up f(W_down x + b_down) + b_up)", adapter_plus),
    "compacter": ("h + f(h W_down) W_up, W = Σ_i A_i ⊗ (s_i t_iᵀ)", compacter),
    "invertible": ("x ↦ [x₁ + F(x₂) ; x₂ + G(·)], and its inverse before the output embedding", invertible),
    "vl_pet": ("G ⊙ (h + A(h)), G = σ(V₂ f(V₁ x))", vl_pet),
}


def mam(kind: str) -> tuple[Tensor, Tensor]:
    """A prefix as a cache that was there before the text, and what a hook adds to each feed-forward network."""
    model, ids = build("llama", "causal"), torch.randint(3, 60, (2, 5))
    base: Any = copy.deepcopy(model)
    inlay.attach(model, make_method(kind, {"num_virtual_tokens": 3, "bottleneck": 3, "projection_size": None}))
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        parts = adapters_of(model).get("default").placed
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for layer, (_, piece) in enumerate((s, p) for s, p in parts[0] if hasattr(p, "source")):
            keys, values = (half.view(1, 3, 2, 8).transpose(1, 2) for half in piece.source().chunk(2, -1))
            cache.update(keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1), layer)
        for layer, (_, piece) in zip(base.model.layers, parts[1], strict=True):
            down, up = piece.bottleneck.down, piece.bottleneck.up
            layer.mlp.register_forward_hook(
                lambda _, x, h, down=down, up=up: h + 4.0 * up(F.relu(down(x[0])))  # the paper's s
            )
        return model(ids).logits, base(ids, past_key_values=cache).logits


def reft(kind: str) -> tuple[Tensor, Tensor]:
    """What comes out of one block, edited at its first two tokens and its last one."""
    model: Any = inlay.attach(build("llama"), make_method(kind, {**FIELDS["reft"], "layers": 0}))
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        ids, seen = torch.randint(3, 60, (2, 5)), {}
        model.layers[1].register_forward_pre_hook(lambda _, x: seen.update(x=x[0]))
        model(ids)
        found = seen["x"]
        with inlay.disabled(model):
            model(ids)
        expected, edits = seen["x"].clone(), model.layers[0].inlays.default.reft.edits
        for token, edit in ((0, edits[0]), (1, edits[0]), (4, edits[1])):
            h, (q, upper) = expected[:, token], torch.linalg.qr(edit.projection.T)
            rotation = (q * upper.diagonal().sign()).T
            change = F.linear(h, edit.weight, edit.bias) - h @ rotation.T
            expected[:, token] = h + change @ rotation
        return found, expected


def unipelt(kind: str) -> tuple[Tensor, Tensor]:
    """The query projection of one block: its LoRA, gated. (The other parts are in tests/methods/test_unipelt.py.)"""
    model: Any = inlay.attach(build("bert"), make_method(kind, {"r": 2, "bottleneck": 3, "use": ("lora", "adapter")}))
    query, seen = model.encoder.layer[1].attention.self.query, {}
    query.register_forward_hook(lambda _, x, y: seen.update(x=x[0], y=y))
    with torch.no_grad():
        for parameter in adapters_of(model).get("default").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model(torch.randint(3, 60, (2, 5)))
        x, t = seen["x"], dict(query.inlays.default.unipelt.named_parameters())
        g = torch.sigmoid(x @ t["gate.weight"] + t["gate.bias"]).mean(1).view(2, 1, 1)
        return seen["y"], F.linear(x, query.weight, query.bias) + g * (x @ t["lora_A"].T @ t["lora_B"].T)


ORACLES: dict[str, tuple[str, Callable[[str], tuple[Tensor, Tensor]]]] = {
    "mam": ("softmax(q [K_p ; K]ᵀ / √d) [V_p ; V], and h + s · A(x)", mam),
    "reft": ("h + Rᵀ(W h + b − R h) at the first and last tokens, R orthonormal", reft),
    "unipelt": ("W x + g · B A x, h + g · A(h), [g K_p ; K] and [g V_p ; V]", unipelt),
}
