"""Rows of the matrix for further methods that show a model more than its text."""

from __future__ import annotations

from properties.models import Row

import inlay

N = 3  # virtual tokens

ROWS = [
    # A prompt changes what a model computes from the start: that is what it is for. These calls name no task.
    Row("multitask_prompt_tuning", inlay.MultitaskPromptTuning(num_virtual_tokens=N, num_tasks=2, task=1),
        dict.fromkeys(("llama", "bert", "t5"), N * 32 + 2 * (N + 32)), identity=1.5, mergeable=False, peft=False,
        targets=False, refuses={"vit": None, "conv": None}),
    Row("cpt", inlay.CPT(token_ids=(5, 9, 12), epsilon=20.0, format_epsilon=20.0), {"llama": N * 32, "gpt2": N * 32},
        identity=1.5, mergeable=False, targets=False, refuses={"t5": None, "vit": None}),
    Row("adaption_prompt", inlay.AdaptionPrompt(num_virtual_tokens=N),
        {"llama": 2 * (N * 32 + 1), "bert": 2 * (N * 32 + 1), "gpt2": 2 * (N * 32 + 1), "vit": 2 * (N * 32 + 1)},
        mergeable=False, compiled=("llama",), refuses={"torch": None, "conv": None}),
    Row("cartridge", inlay.Cartridge(num_virtual_tokens=N), {"llama": (N - 1) * 2 * 32, "gpt2": (N - 1) * 2 * 64},
        identity=1.5, mergeable=False, compiled=(), refuses={"torch": None}),
]  # fmt: skip
