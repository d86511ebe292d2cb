"""LayerNorm tuning against HF peft: outputs, gradients, and files both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from oracles.against_peft import Case
from oracles.other_methods import both_ways, ids, model, pairs_of_ids

import inlay

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # peft, of every norm
]

Tuning = inlay.LayerNormTuning

CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "bert": (Case(model("bert"), ids, {}, Tuning()), {"target_modules": ["LayerNorm"]}),
    "a new head": (
        Case(model("bert", "sequence"), ids, {}, Tuning(layers=[0])),
        {"task_type": "SEQ_CLS", "target_modules": ["attention.output.LayerNorm"]},
    ),
    "llama": (
        Case(model("llama", "causal"), ids, {}, Tuning(targets="input_layernorm,ffn_norm")),
        {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]},
    ),
    "gpt2": (
        Case(model("gpt2", "causal"), ids, {}, Tuning(targets="attention_norm")),
        {"target_modules": r".*ln_[12f]"},
    ),
    "t5": (
        Case(model("t5", "conditional"), pairs_of_ids, {}, Tuning()),
        {"target_modules": ["layer_norm", "final_layer_norm"]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_outputs_gradients_and_files(name: str, tmp_path: Path) -> None:
    case, fields = CASES[name]
    both_ways(case, peft.LNTuningConfig(**fields), tmp_path)
