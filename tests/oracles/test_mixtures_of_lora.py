"""Methods that mix several low-rank adapters, against HF peft: outputs, gradients, and files both ways."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import pytest
from oracles.against_peft import Case
from oracles.other_methods import both_ways, ids, model

import inlay

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ATTENTION = ["query", "key", "value", "attention.output.dense"]
CASES: dict[str, tuple[str, inlay.Method, Callable[[], peft.PeftConfig]]] = {
    "lily": ("bert", inlay.Lily(r=3, targets="attention"), partial(peft.LilyConfig, r=3, target_modules=ATTENTION)),
    "lily, shared A": (
        "llama", inlay.Lily(r=3, stride_A=2, num_B=3, scale=0.5, targets="attention,down"),
        partial(peft.LilyConfig, r=3, stride_A=2, num_B=3, scaling=0.5,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]),
    ),
    "lily, by shape": (
        "bert", inlay.Lily(r=3, stride_A=3, targets="query,key", sharing=[""]),
        partial(peft.LilyConfig, r=3, stride_A=3, target_modules=r".*\.(query|key)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    host, method, config = CASES[name]
    both_ways(Case(model(host), ids, {}, method), config(), tmp_path, merges=False)
