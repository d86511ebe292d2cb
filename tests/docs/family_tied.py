"""LoRA on tied weights as one: its formula, from the tensors that it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from engine.tiny import build
from torch import Tensor

import inlay
from inlay.engine.adapters import adapters_of

FIELDS: dict[str, dict[str, Any]] = {"weight_tied_lora": {"r": 2}}


def table(kind: str) -> tuple[Tensor, Tensor]:
    model, ids = build("llama", "causal", tie_word_embeddings=True), torch.randint(3, 60, (2, 5))
    base = copy.deepcopy(model)
    inlay.attach(model, inlay.WeightTiedLoRA(r=2, init="random", targets="lm_head"))
    (a, b) = adapters_of(model).get("default").parameters()
    with torch.no_grad():
        base.model.embed_tokens.weight += 16 / 2 * (b @ a).T
        assert base.lm_head.weight is base.model.embed_tokens.weight
        return model(ids).logits, base(ids).logits


ORACLES: dict[str, tuple[str, Callable[[str], tuple[Tensor, Tensor]]]] = {
    "weight_tied_lora": ("W′ = W + s · B A, one A and B for tied W", table),
}
FORMULAS: dict[str, tuple[str, Callable[..., Tensor]]] = {}
