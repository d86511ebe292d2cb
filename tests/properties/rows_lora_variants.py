"""Rows of the matrix for the variants of LoRA that HF peft keeps in LoRA's own file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from properties.models import GROUPED, Row, linears, total

import inlay

R = 2


def lora(i: int, o: int) -> int:
    return R * (i + o)


def kasa(i: int, o: int) -> int:
    return R * (i + o + 1)


def mica(i: int, o: int) -> int:
    return R * i


def monteclora(i: int, o: int) -> int:
    return R * (i + o + 1) + 4


def qalora(i: int, o: int) -> int:
    return R * (i // 4 + o)


def blocks_a(shapes: list[tuple[int, int]]) -> int:
    return sum(R * (i // 2 + o) for i, o in shapes)


def blocks_b(shapes: list[tuple[int, int]]) -> int:
    return sum(R * (i + o // 2) for i, o in shapes)


def few(count: Callable[[int, int], int], *names: str) -> dict[str, Any]:
    """Every linear of some hosts, and of "torch" those that nn.MultiheadAttention does not stand for."""
    own = {"torch": ("linear1,linear2", 2 * total([(12, 20), (20, 12)], count))}
    return {host: claim for host, claim in (linears(count) | own).items() if host in names}


ROWS = [
    # The tokens stand once in the first text, in its middle, and not in the second.
    Row("alora", inlay.ALoRA(r=R, invocation_tokens=(7, 11)),
        {"llama": 2 * (lora(32, 32) + lora(32, 16)), "gpt2": ("attention", 2 * total([(32, 96), (32, 32)], lora)),
         "mixtral": ("attention", 2 * total(GROUPED, lora))},
        mergeable=False, compiled=("llama",), refuses={"t5": None, "vit": None, "mixtral": "experts"}),
    Row("bdlora", inlay.BDLoRA(r=R), {
        "llama": ("attention,ffn", 2 * (blocks_b([(32, 32), (32, 16), (32, 16), (32, 48), (32, 48)])
                                        + blocks_a([(32, 32), (48, 32)]))),
        "bert": 2 * blocks_b([(32, 32), (32, 32)]),
        "vit": ("attention", 2 * (blocks_b([(32, 32)] * 3) + blocks_a([(32, 32)]))),
        "gpt2": 2 * blocks_b([(32, 96)]),
    }, compiled=("llama",), refuses={"mixtral": "experts", "conv": None}),
    # It starts at W without the smallest singular values: that is what it does to W.
    Row("kasa", inlay.KaSA(r=R), few(kasa, "llama", "bert", "gpt2", "torch"), identity=0.4, compiled=("llama",),
        refuses={"mixtral": "experts", "conv": None, "tied": "embed"}),
    Row("mica", inlay.MiCA(r=R), few(mica, "bert", "llama", "gpt2") | {"tied": ("embed,mix", R * (11 + 8))},
        compiled=("tied",), refuses={"mixtral": "experts", "conv": None}),
    Row("monteclora", inlay.MonteCLoRA(r=R, num_samples=4), few(monteclora, "bert", "llama", "gpt2", "torch"),
        compiled=("llama",), drawn=True, refuses={"mixtral": "experts", "conv": None, "tied": "embed"}),
    Row("qalora", inlay.QALoRA(r=R, group_size=4), few(qalora, "bert", "llama", "gpt2", "torch"), peft=False,
        compiled=("llama",), refuses={"mixtral": "experts", "conv": None, "tied": "embed"}),
    # A feature a group: the gradients of training mode are then those of evaluation mode, which the matrix compares.
    Row("velora", inlay.VeLoRA(r=R, num_groups=32), {
        "llama": 2 * (lora(32, 32) + lora(32, 16)), "gpt2": 2 * lora(32, 96), **few(lora, "torch"),
    }, compiled=(), refuses={"mixtral": "experts", "conv": None, "tied": "embed"}),
]  # fmt: skip
