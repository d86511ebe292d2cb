"""Methods that mix several low-rank adapters, against HF peft: outputs, gradients, and files both ways."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles.against_peft import CLOSE, Case, run
from oracles.other_methods import both_ways, ids, model, perturbed_peft

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

POLY: dict[str, tuple[inlay.Poly, dict[str, Any], list[int]]] = {
    "one task": (inlay.Poly(r=3), {"r": 3}, [0, 0]),
    "rows of tasks": (
        inlay.Poly(r=3, n_tasks=4, n_skills=3, targets="attention"),
        {"r": 3, "n_tasks": 4, "n_skills": 3, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, [3, 1],
    ),
    "splits": (
        inlay.Poly(r=2, n_tasks=2, n_splits=4, targets="ffn"),
        {"r": 2, "n_tasks": 2, "n_splits": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]}, [1, 1],
    ),
}  # fmt: skip


def of_tasks(tasks: list[int]) -> Callable[[], dict[str, Any]]:
    """Two texts of ten tokens, and the task of each."""
    return lambda: {**ids(), "task_ids": torch.tensor(tasks)}


def poly_config(fields: dict[str, Any]) -> peft.PolyConfig:
    return peft.PolyConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **fields})


@pytest.mark.parametrize("name", POLY)
def test_poly_both_ways(name: str, tmp_path: Path) -> None:
    method, fields, tasks = POLY[name]
    both_ways(Case(model("llama", "causal"), of_tasks(tasks), {}, method), poly_config(fields), tmp_path, merges=False)


def test_poly_draws_what_peft_draws_in_training(tmp_path: Path) -> None:
    theirs = perturbed_peft(model("llama", "causal")(), poly_config({"r": 3, "n_tasks": 2, "n_splits": 2}))
    theirs.save_pretrained(tmp_path)
    ours, inputs = inlay.load(model("llama", "causal")(), tmp_path), of_tasks([1, 0])()
    found = []
    for one in (theirs, ours):
        torch.manual_seed(3)
        found.append(run(one.train(), inputs, backward=False))
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    assert not torch.equal(run(ours, inputs, backward=False), found[1])  # drawn anew
    assert torch.equal(run(ours.eval(), inputs, backward=False), run(ours, inputs, backward=False))


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    host, method, config = CASES[name]
    both_ways(Case(model(host), ids, {}, method), config(), tmp_path, merges=False)
