"""Further methods that show a model more than its text: their fields and symbols, and their formulas by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from engine.tiny import build
from torch import Tensor
from transformers import DynamicCache

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.registry import make_method

FIELDS: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"num_virtual_tokens": 3, "projected": False},
    "cartridge": {"num_virtual_tokens": 3},
    "cpt": {"token_ids": (5, 9, 12), "epsilon": 100.0, "format_epsilon": 100.0},
    "multitask_prompt_tuning": {"num_virtual_tokens": 3},
}
FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {}
UNTARGETED = ("cpt", "multitask_prompt_tuning")
SYMBOLS = {"adaption_prompt": {"d": 32}, "cartridge": {"n": 2}, "multitask_prompt_tuning": {"T": 1, "k": 1}}


def prompts(kind: str) -> tuple[Tensor, Tensor]:
    model, ids = build("llama", "causal"), torch.randint(3, 60, (2, 5))
    base = copy.deepcopy(model)
    inlay.attach(model, make_method(kind, FIELDS[kind]))
    with torch.no_grad():
        shared, columns, rows = (p.copy_(torch.randn_like(p)) for p in adapters_of(model).get("default").parameters())
        vectors = shared * (columns[0] @ rows[0])
        embedded = torch.cat((vectors.expand(2, -1, -1), base.model.embed_tokens(ids)), dim=1)
        return model(ids).logits, base(inputs_embeds=embedded).logits[:, 3:]


def context(kind: str) -> tuple[Tensor, Tensor]:
    model, ids = build("llama", "causal"), torch.randint(3, 60, (2, 5))
    base = copy.deepcopy(model)
    inlay.attach(model, make_method(kind, {**FIELDS[kind], "epsilon": 4.0, "format_epsilon": 4.0}))
    with torch.no_grad():
        (delta,) = (p.copy_(torch.randn_like(p)) for p in adapters_of(model).get("default").parameters())
        # 4 at a width of 2048 is half as much at 32; a vector of 32 such numbers is about six times as long.
        vectors = base.model.embed_tokens(torch.tensor([5, 9, 12])) + delta / delta.norm(dim=1, keepdim=True) / 2
        embedded = torch.cat((vectors.expand(2, -1, -1), base.model.embed_tokens(ids)), dim=1)
        return model(ids).logits, base(inputs_embeds=embedded).logits[:, 3:]


def beside(kind: str) -> tuple[Tensor, Tensor]:
    """In the first layer of a GPT-2, which peft has without the projection of what is added."""
    model, x = build("gpt2", "causal").eval(), torch.randn(2, 5, 32)
    base = copy.deepcopy(model).transformer.h[0].attn
    inlay.attach(model, make_method(kind, {**FIELDS[kind], "projected": True}))
    with torch.no_grad():
        prompt, gate = (p.copy_(torch.randn_like(p)) for p in [*adapters_of(model).get("default").parameters()][:2])
        q, k, v = (part.view(2, 5, 4, 8).transpose(1, 2) for part in base.c_attn(x).split(32, dim=-1))
        _, k_p, v_p = (part.view(1, 3, 4, 8).transpose(1, 2) for part in base.c_attn(prompt).split(32, dim=-1))
        future = ~torch.ones(5, 5, dtype=torch.bool).tril()
        seen = (q @ k.mT / 8**0.5).masked_fill(future, -torch.inf).softmax(-1) @ v
        seen = seen + gate * (q @ k_p.mT / 8**0.5).softmax(-1) @ v_p
        return model.transformer.h[0].attn(x)[0], base.c_proj(seen.transpose(1, 2).flatten(2))


def cartridge(kind: str) -> tuple[Tensor, Tensor]:
    model, ids = build("llama", "causal"), torch.randint(3, 60, (2, 5))
    base = copy.deepcopy(model)
    inlay.attach(model, make_method(kind, FIELDS[kind]))
    cache = DynamicCache(config=base.config)
    sources = [piece.source for _, piece in adapters_of(model).get("default").pieces() if hasattr(piece, "source")]
    for layer, source in enumerate(sources):
        rows = torch.cat((source.frozen, source.prefix.detach()))  # (n, 2 · heads · width): keys, then values
        keys, values = (half.view(1, 3, 2, 8).transpose(1, 2) for half in rows.chunk(2, -1))
        cache.update(keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1), layer)
    with torch.no_grad():
        return model(ids).logits, base(ids, past_key_values=cache).logits


ORACLES: dict[str, tuple[str, Callable[[str], tuple[Tensor, Tensor]]]] = {
    "adaption_prompt": ("softmax(q Kᵀ / √d) V + g · softmax(q K_pᵀ / √d) V_p", beside),
    "cartridge": ("softmax(q [K_f ; K_p ; K]ᵀ / √d) [V_f ; V_p ; V]", cartridge),
    "cpt": ("E′ = [E(c) + δ ; E(x)], ‖δ_i‖ ≤ ε_i", context),
    "multitask_prompt_tuning": ("E′ = [P ⊙ (C_t R_t) ; E(x)]", prompts),
}
