"""Rows of the matrix for reversible stacks: two streams and their mean are another computation than the base's."""

from __future__ import annotations

from properties.models import Row

import inlay

M = 2


def adapter(d: int) -> int:
    return 2 * M * d + M + d


ROWS = [
    Row("meft-1", inlay.MEFT(variant=1, bottleneck=M), {
        "llama": 4 * adapter(32), "bert": 4 * adapter(32), "t5": 8 * adapter(32),
    }, identity=1.5, mergeable=False, peft=False, compiled=("llama",), refuses={"conv": None, "tied": None}),
    Row("meft-2", inlay.MEFT(variant=2, bottleneck=M), {"vit": 4 * adapter(32)}, identity=1.5, mergeable=False,
        peft=False, compiled=()),
    Row("meft-3", inlay.MEFT(variant=3, bottleneck=M), {
        "gpt2": 4 * adapter(32), "torch": 4 * adapter(12),
    }, identity=1.5, mergeable=False, peft=False, compiled=("gpt2",), refuses={"conv": None}),
]  # fmt: skip
