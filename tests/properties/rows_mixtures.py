"""Rows of the matrix for methods that mix several low-rank adapters."""

from __future__ import annotations

from properties.models import FFN, GATED, GROUPED, SQUARE, Row, linears, total

import inlay

R, N = 2, 3  # rank; matrices B of a group


def lily(shapes: list[tuple[int, int]], layers: int) -> int:
    """Groups of `layers` places each, in which every two neighbours share A."""
    return total(shapes, lambda i, o: layers * R * N + -(-layers // 2) * R * i + N * R * o)


def poly(i: int, o: int) -> int:
    """Three skills, two tasks, two splits."""
    return 3 * R * (i + o) + 2 * 2 * 3


POLY = {host: claim for host, claim in linears(poly).items() if host in ("bert", "llama", "gpt2", "vit")}

ROWS = [
    Row("lily", inlay.Lily(r=R, stride_A=2, num_B=N), {
        "bert": ("attention,ffn", lily(4 * SQUARE + FFN, 2)),
        "llama": ("all-linear", lily(GROUPED + GATED, 2)),
        "gpt2": ("c_attn,c_fc", lily([(32, 96), (32, 48)], 2)),
        "plain": ("a,b", lily([(12, 16), (16, 12)], 3)),
    }, mergeable=False, compiled=("llama",), refuses={"mixtral": "experts", "conv": None, "tied": "embed"}),
    # With draws in training no two steps are alike, and peft has no task for all rows: tests/methods/test_poly.py.
    Row("poly", inlay.Poly(r=R, n_tasks=2, n_skills=3, n_splits=2, task=1, sample="never"), POLY, mergeable=False,
        peft=False, compiled=("llama",), refuses={"mixtral": "experts", "conv": None, "plain": "out"}),
]  # fmt: skip
