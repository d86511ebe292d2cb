"""Tiny models with adapters to put together, and running some of them."""

from __future__ import annotations

from typing import Any

import torch
from engine import tiny
from engine.small import randomise
from torch import Tensor, nn

import inlay

TEXT = torch.arange(2, 26).reshape(4, 6)
BOTTLENECK = inlay.Adapter(bottleneck=4, activation="gelu")
CASES: dict[str, tuple[str, str, Any]] = {
    "lora-with-heads": ("bert", "sequence", inlay.LoRA(r=2)),
    "norms": ("bert", "trunk", BOTTLENECK),
    "after-networks": ("llama", "causal", BOTTLENECK),
    "rotated-inputs": ("llama", "causal", inlay.OFT(block_size=4)),
    "trained-copies": ("gpt2", "causal", inlay.BitFit()),
    "several-methods": ("t5", "trunk", [inlay.LoRA(r=2, targets="ffn.up"), inlay.Adapter(bottleneck=4)]),
    "routed": ("mixtral", "causal", BOTTLENECK),
}


def model(name: str, head: str = "trunk", method: Any = BOTTLENECK, adapters: str = "abc") -> nn.Module:
    """A tiny model with these adapters, whose every tensor matters."""
    base = tiny.build(name, head).requires_grad_(False)
    for adapter in adapters:
        inlay.attach(base, method, adapter)
        torch.manual_seed(ord(adapter))
        randomise(base, adapter)
    inlay.activate(base)
    return base


MODELS: dict[str, nn.Module] = {}


def shared(case: str) -> nn.Module:
    """One model for each case; tests leave its adapters as they are."""
    name, head, method = CASES[case]
    if case not in MODELS:
        MODELS[case] = model(name, head, method)
    MODELS[case].zero_grad(set_to_none=True)
    inlay.activate(MODELS[case])
    return MODELS[case].eval()


def run(base: nn.Module, *parts: Any, ids: Tensor = TEXT) -> Tensor:
    inputs = {"input_ids": ids}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :3]
    with inlay.using(base, *parts):
        result: Tensor = base(**inputs)[0]
    return result


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)  # other batches, other sums
