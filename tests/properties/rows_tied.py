"""Rows of the matrix for LoRA on tied weights as one."""

from __future__ import annotations

from properties.models import Row

import inlay

R = 2


def lora(i: int, o: int) -> int:
    return R * (i + o)


ROWS = [
    Row("weight_tied_lora", inlay.WeightTiedLoRA(r=R), {
        "tied": ("unembed,mix", lora(11, 8) + lora(8, 8)),
        "gpt2": ("query,embed", 2 * lora(32, 96) + lora(64, 32)),
    }, compiled=("tied",)),
]  # fmt: skip
