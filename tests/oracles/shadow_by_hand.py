"""A shadow's formula in a Llama of two blocks, whose own parts are called one after the other."""

from __future__ import annotations

import copy

import torch
from methods.prompt_hosts import TEXT, host
from oracles.against_peft import shift
from torch import Tensor

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.registry import make_method


def by_hand(kind: str) -> tuple[Tensor, Tensor]:
    """The model's logits, and those of the formula."""
    torch.manual_seed(0)
    model = host("llama", "causal")
    base = copy.deepcopy(model)
    inlay.attach(model, make_method(kind, {"r": 2, "alpha": 0.7}))
    shift(adapters_of(model).get("default").parameters())
    pieces = [piece for _, piece in adapters_of(model).get("default").pieces()]
    (network,) = (piece for piece in pieces if hasattr(piece, "shadow_backbone"))
    with torch.no_grad():
        h = base.model.embed_tokens(TEXT)
        s = network.shadow_backbone(inputs_embeds=h).last_hidden_state
        mask = torch.full((6, 6), -torch.inf).triu(1)[None, None]
        positions = base.model.rotary_emb(h, torch.arange(6)[None])
        for block, t in zip(base.model.layers, [p for p in pieces if hasattr(p, "alpha")], strict=True):
            h = h + 0.7 * (h - s) @ t.shadow_down.weight.T @ t.shadow_up.weight.T
            h = block(h, attention_mask=mask, position_embeddings=positions)
            g = torch.sigmoid(t.shadow_update_gate(h))
            s = (1 - g) * s + g * t.shadow_update_transform(h)
        return model(TEXT).logits, base.lm_head(base.model.norm(h))
