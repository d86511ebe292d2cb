"""Rows of the matrix for methods that run a network beside the model. Widths are 32, inner widths 48, blocks 2."""

from __future__ import annotations

from properties.models import Row

import inlay

R, W, D = 2, 3, 32
BLOCKS = 2 * 2 * R * D + 2 * (W * D + W + D * W + D)  # T and G of the first block alone: nothing reads the last state
LLAMA = 2 * D * D + 2 * 16 * D + 3 * 48 * D + 3 * D
GPT2 = 4 * D * D + 4 * D + 2 * 48 * D + 48 + D + 6 * D + 40 * D  # with its positions
BERT = 4 * D * D + 4 * D + 2 * 48 * D + 48 + D + 6 * D + 42 * D  # with its positions and types
NARROW = 4 * 16 * 16 + 3 * 20 * 16 + 3 * 16 + 64 * 16 + 16 * D  # with a table of tokens and a projection

ROWS = [
    Row("shadow", inlay.Shadow(r=R, update_hidden_size=W, alpha=2.0, dropout=0.0), {
        "llama": BLOCKS + LLAMA, "gpt2": BLOCKS + GPT2, "bert": BLOCKS + BERT,
    }, mergeable=False, compiled=("llama",), refuses={"t5": None, "vit": None, "conv": None, "torch": None}),
    Row("shadow-narrow", inlay.Shadow(r=R, update_hidden_size=W, alpha=2.0, dropout=0.0, hidden_size=16,
                                      num_attention_heads=2, intermediate_size=20),
        {"llama": BLOCKS + NARROW}, mergeable=False, compiled=()),
]  # fmt: skip
