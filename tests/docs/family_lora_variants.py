"""The variants of LoRA that HF peft keeps in LoRA's own file: their formulas, from the tensors that they train."""

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

FIELDS: dict[str, dict[str, Any]] = {
    "alora": {"r": 2, "invocation_tokens": (51,)},
    "bdlora": {"r": 2, "blocks_in_a": ("place",)},
    "kasa": {"r": 2},
    "mica": {"r": 2},
    "monteclora": {"r": 2, "num_samples": 3},
    "qalora": {"r": 2, "group_size": 3},
    "velora": {"r": 2},
}
UNTARGETED = {"alora"}
SYMBOLS = {"bdlora": {"n": 2}, "qalora": {"n": 3}}


def alora(kind: str) -> tuple[Tensor, Tensor]:
    model, ids = build("llama", "causal"), torch.randint(3, 60, (2, 5))
    ids[:, 2], ids[:, [0, 1, 3, 4]] = 60, ids[:, [0, 1, 3, 4]]
    base = copy.deepcopy(model)
    inlay.attach(model, inlay.ALoRA(r=2, init="random", invocation_tokens=(60,)))
    for site, piece in adapters_of(model).get("default").pieces():
        if site.kind == "linear":
            t: dict[str, Tensor] = {name: tensor.detach() for name, tensor in piece.named_parameters()}

            def add(_: Any, x: tuple[Tensor], y: Tensor, t: dict[str, Tensor] = t) -> Tensor:
                late = (torch.arange(5) >= 2)[:, None]
                return y + late * 16 / 2 * (x[0] @ t["lora_A"].T @ t["lora_B"].T)

            base.get_submodule(site.path).register_forward_hook(add)
    with torch.no_grad():
        return model(ids).logits, base(ids).logits


def bdlora(x: Tensor, w: Tensor, b: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    a = torch.zeros(2, 6)
    a[0, :3], a[1, 3:] = lora_A
    return F.linear(x, w + 16 / 2 * lora_B @ a, b)


def kasa(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(w)
    kept = (u[:, :4] * s[:4]) @ v[:4]  # four of six
    return F.linear(x, kept + 16 / 2 * t["lora_B"] @ torch.diag(t["lora_diag"]) @ t["lora_A"], b)


def mica(x: Tensor, w: Tensor, b: Tensor, lora_A: Tensor) -> Tensor:
    u, _, _ = torch.linalg.svd(w, full_matrices=False)
    least = u[:, -2:]
    signs = least.gather(0, least.abs().argmax(0, keepdim=True)).sign()
    return F.linear(x, w + 16 / 2 * (least * signs) @ lora_A, b)


def monteclora(x: Tensor, w: Tensor, b: Tensor, **t: Tensor) -> Tensor:
    return F.linear(x, w + 16 / 2 * t["lora_B"] @ t["lora_A"], b)


def qalora(x: Tensor, w: Tensor, b: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    sums = x.view(len(x), 2, 3).sum(-1)
    return F.linear(x, w, b) + 16 / 2 * (sums @ lora_A.T @ lora_B.T)


def velora(x: Tensor, w: Tensor, b: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return F.linear(x, w, b) + 16 / 2 * (x @ lora_A.T @ lora_B.T)


ORACLES: dict[str, tuple[str, Callable[[str], tuple[Tensor, Tensor]]]] = {
    "alora": ("y = W x, and W x + s · B (A x) from the invocation on", alora),
}
FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "bdlora": ("W′ = W + s · B A, A or B block-diagonal", bdlora),
    "kasa": ("W′ = W − D + s · B diag(σ) A", kasa),
    "monteclora": ("W′ = W + s · B A, A drawn around its mean in training", monteclora),
    "qalora": ("y = W x + s · B A Q x, Q the sums of groups of inputs", qalora),
    "velora": ("y = W x + s · B (A x), dA from x̂", velora),
    "mica": ("W′ = W + s · B A, B frozen", mica),
}
