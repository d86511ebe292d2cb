"""Rows of the matrix for methods whose change has a structure: shares of W, a grid of blocks, shards, a bias."""

from __future__ import annotations

from properties.models import GROUPED, Row, total
from properties.rows_products import CONVOLUTIONS, MIXED, of_linears

import inlay

R = 2
SPLIT = {5: (1, 5), 12: (3, 4), 16: (4, 4), 20: (4, 5), 32: (4, 8), 36: (6, 6), 48: (6, 8), 96: (8, 12)}
LOKR_CONVOLUTIONS = (2 + 4 + 2 * 3) + (4 + 3 + 4 * 6) + (4 + 2 + 3 * 9)  # W₁, and W₂'s two factors of rank 1


def lora(i: int, o: int) -> int:
    return R * (i + o)


def twice(i: int, o: int) -> int:
    return 2 * lora(i, o)


def lokr(i: int, o: int) -> int:
    (m, n), (l, k) = SPLIT[i], SPLIT[o]  # noqa: E741
    return l * m + k + n


ROWS = [
    Row("hira", inlay.HiRA(r=R), of_linears(lora, conv=(MIXED, total(CONVOLUTIONS, lora)),
        tied=("embed,mix", lora(11, 8) + lora(8, 8))), compiled=("llama", "conv", "tied"),
        refuses={"mixtral": "experts"}),
    Row("gralora", inlay.GraLoRA(r=4, alpha=4),
        of_linears(twice, plain=("a,b", 3 * total([(12, 16), (16, 12)], twice))),
        compiled=("llama",), refuses={"plain": "out", "conv": None}),
    Row("gralora-hybrid", inlay.GraLoRA(r=2, alpha=4, hybrid_r=2, targets="attention"),
        {"llama": 2 * total(GROUPED, twice), "gpt2": 2 * total([(32, 96), (32, 32)], twice)}),
    Row("delora", inlay.DeLoRA(r=R, strength=2.0), of_linears(lambda i, o: lora(i, o) + 1), compiled=("llama",),
        refuses={"conv": None, "tied": "embed"}),
    Row("lokr", inlay.LoKr(r=1), of_linears(lokr, conv=(MIXED, LOKR_CONVOLUTIONS)),
        compiled=("llama", "conv"), refuses={"mixtral": "experts"}),
    Row("lokr-full", inlay.LoKr(r=4, targets="attention", decompose_factor=4),
        {"llama": 2 * total(GROUPED, lambda i, o: 16 + i * o // 16)}, compiled=()),
    Row("lokr-both", inlay.LoKr(r=1, decompose_both=True, decompose_factor=8),
        {"bert": 4 * (8 + 8 + 4 + 4)}, compiled=()),
    Row("miss", inlay.MiSS(r=3), of_linears(lambda i, o: 3 * o), compiled=("llama",),
        refuses={"conv": None, "mixtral": "experts"}),
    Row("miss-mini", inlay.MiSS(r=4, variant="mini", mini_r=2, targets="attention"), {"llama": 2 * 4 * 4 * 2}),
    Row("miss-bat", inlay.MiSS(r=4, variant="bat"),
        {host: claim for host, claim in of_linears(lambda i, o: 4 * o).items() if host != "plain"},
        compiled=("llama",), refuses={"plain": "out"}),
    Row("beft", inlay.BEFT(), of_linears(lambda i, o: o) | {
        "bert": 2 * 32, "llama": 2 * 16, "gpt2": ("all-linear", 2 * (96 + 32 + 48 + 32)), "t5": 6 * 32, "vit": 2 * 32,
    }, compiled=("llama",), refuses={"conv": None, "mixtral": "experts"}),
]  # fmt: skip
