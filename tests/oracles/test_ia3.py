"""(IA)³ against HF peft: outputs, gradients, and files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles.against_peft import Case, randomise
from oracles.other_methods import both_ways, ids, model, pairs_of_ids
from torch import nn

import inlay

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IA3 = inlay.IA3


class Picture(nn.Module):
    """Convolutions over two and three dimensions, one of them grouped, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 4, 3, groups=2, bias=False)
        self.space = nn.Conv3d(4, 6, (1, 2, 2))
        self.out = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.grouped(torch.relu(self.plane(x))))
        result: torch.Tensor = self.out(self.space(x.unsqueeze(2)).flatten(2).mean(-1))
        return result


def picture() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Picture().eval()


def pixels() -> dict[str, Any]:
    return {"x": torch.linspace(-2, 2, 2 * 3 * 36).sin().reshape(2, 3, 6, 6)}


CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    # peft's defaults for the architecture: on BERT "output.dense" is in both sub-layers and counts as feed-forward
    "bert, peft's defaults": (
        Case(model("bert"), ids, {}, IA3()),
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "bert, our defaults": (
        Case(model("bert"), ids, {}, IA3(targets="key,value,down")),
        {"target_modules": ["key", "value", "layer.0.output.dense"], "feedforward_modules": ["layer.0.output.dense"]},
    ),
    "a new head": (
        Case(model("bert", "sequence"), ids, {}, IA3()),
        {"task_type": "SEQ_CLS", "target_modules": ["key", "value"], "feedforward_modules": []},
    ),
    "gpt2": (
        Case(model("gpt2", "causal"), ids, {}, IA3()),
        {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"],
         "fan_in_fan_out": True},
    ),
    "llama": (
        Case(model("llama", "causal"), ids, {}, IA3()),
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "t5": (
        Case(model("t5", "conditional"), pairs_of_ids, {}, IA3()),
        {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
    ),
    "gated t5": (
        Case(model("t5-gated", "conditional"), pairs_of_ids, {}, IA3()),
        {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
    ),
    "patterns": (
        Case(model("bert"), ids, {}, IA3(targets="re:.*[.](query|up)", feedforward=())),
        {"target_modules": r".*\.0\.(attention\.self\.value|intermediate\.dense)", "feedforward_modules": r".*dense"},
    ),
    "convolutions": (
        Case(picture, pixels, {}, IA3(targets="plane,grouped,space,out", feedforward=["grouped", "space"])),
        {"target_modules": ["plane", "grouped", "space"], "feedforward_modules": ["grouped"]},
    ),
    "convolutions at their inputs": (
        Case(picture, pixels, {}, IA3(targets="plane,space", feedforward="plane")),
        {"target_modules": ["plane", "space", "out"], "feedforward_modules": ["plane", "space", "out"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_same_outputs_gradients_and_files(name: str, tmp_path: Path) -> None:
    case, fields = CASES[name]
    both_ways(case, peft.IA3Config(**fields), tmp_path)


def test_feed_forward_names_that_peft_would_confuse(tmp_path: Path) -> None:
    # peft asks whether the path of "vo" ends with "o": it does, so the config has to spell the place out.
    class Confusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vo, self.o = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.o(torch.relu(self.vo(x)))
            return result

    base = Confusing().eval()
    x = torch.randn(3, 4)
    ours = inlay.attach(base, IA3(targets="o,vo", feedforward="o"))
    randomise(ours)
    inlay.save(ours, tmp_path)
    expected = ours(x)
    inlay.detach(ours)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(x), expected)


@pytest.mark.parametrize(
    ("build", "method"),
    [
        (model("bert"), IA3(form="additive", targets="key")),
        (model("mixtral", "causal"), IA3()),
        (lambda: nn.Sequential(nn.Conv1d(2, 3, 1)), IA3(targets="0")),
    ],
)
def test_what_peft_does_not_have_is_not_written_as_if_it_had(build: Any, method: IA3, tmp_path: Path) -> None:
    ours = inlay.attach(build(), method)
    inlay.save(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "INLAY"
    inlay.load(inlay.detach(ours), tmp_path)
