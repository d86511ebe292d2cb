"""Methods whose change is a product of small matrices, against HF peft: outputs, gradients, and files both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from oracles.against_peft import Case
from oracles.other_methods import both_ways, ids, model

import inlay

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ATTENTION = ["query", "key", "value", "attention.output.dense"]
CASES: dict[str, tuple[inlay.Method, peft.PeftConfig]] = {
    "loha, thin": (
        inlay.LoHa(r=2, alpha=3, targets="attention"), peft.LoHaConfig(r=2, alpha=3, target_modules=ATTENTION)
    ),
    "loha, dense": (inlay.LoHa(r=6, targets="attention"), peft.LoHaConfig(r=6, target_modules=ATTENTION)),
    "loha, patterns": (
        inlay.LoHa(r=2, targets="query,key", overrides={"query": {"r": 4}, "key": {"alpha": 5}}),
        peft.LoHaConfig(r=2, target_modules=["query", "key"], rank_pattern={"query": 4}, alpha_pattern={"key": 5}),
    ),
    "adalora": (
        inlay.AdaLoRA(init_r=4, target_r=2, alpha=3, targets="attention"),
        peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=3, target_modules=ATTENTION, total_step=9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    method, config = CASES[name]
    both_ways(Case(model("bert"), ids, {}, method), config, tmp_path)


REFUSED: dict[str, dict[str, Any]] = {"LoHa": {"module_dropout": 0.1}}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (entry,) = REFUSED[name]
    base = model("bert")()
    config = getattr(peft, f"{name}Config")(target_modules=["query"], **REFUSED[name])
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(inlay.InlayError, match=entry):
        inlay.load(model("bert")(), tmp_path)
