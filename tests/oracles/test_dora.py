"""DoRA against HF peft: outputs, gradients, and files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import tiny
from oracles.against_peft import Case, both_ways, randomise, run
from oracles.test_lora import Around, Lookup, floats, ids, model, pytestmark, seeded  # noqa: F401  (the mark is read)
from torch import nn

import inlay
from inlay.errors import UnsupportedError

DoRA = inlay.DoRA


def case(build: Any, inputs: Any, *targets: str, r: int = 4, alpha: int = 8, **config: Any) -> Case:
    fields = {"r": r, "lora_alpha": alpha, "target_modules": list(targets), "use_dora": True, **config}
    return Case(build, inputs, fields, DoRA(r=r, alpha=alpha, targets=list(targets)))


CASES: dict[str, Case] = {
    "linear": case(model("llama", "causal"), ids, "q_proj", "down_proj"),
    "linear with bias": case(model("bert"), ids, "query", "value"),
    "conv1d of gpt-2": case(model("gpt2", "causal"), ids, "c_attn", "c_fc", fan_in_fan_out=True),
    "embedding": case(seeded(Lookup), ids, "table", r=3),
    "scaled embedding": case(model("gemma"), ids, "embed_tokens", r=3),
    "conv1d": case(seeded(lambda: Around(nn.Conv1d(4, 6, 3, stride=2))), floats(2, 4, 9), "inner"),
    "conv2d": case(seeded(lambda: Around(nn.Conv2d(4, 6, 3, padding=1))), floats(2, 4, 7, 6), "inner"),
    "conv2d without bias": case(seeded(lambda: Around(nn.Conv2d(4, 6, 3, bias=False))), floats(2, 4, 7, 6), "inner"),
    "conv3d": case(seeded(lambda: Around(nn.Conv3d(2, 3, 2))), floats(2, 2, 3, 4, 3), "inner", r=2),
    "head": case(model("roberta", "sequence"), ids, "query", "value", task_type="SEQ_CLS"),
}
CASES["rank-stabilised, with patterns"] = Case(
    model("llama"), ids,
    {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_dora": True, "use_rslora": True,
     "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    DoRA(r=4, alpha=8, rank_stabilised=True, targets="q_proj,v_proj",
         overrides={"v_proj": {"r": 2}, "layers.1.self_attn.q_proj": {"alpha": 3}}),
)  # fmt: skip
CASES["biases of adapted modules"] = Case(
    model("bert"), ids, {"r": 2, "target_modules": ["query"], "use_dora": True, "bias": "lora_only"},
    DoRA(r=2, alpha=8, targets="query", bias="lora_only"),
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_files_are_those_of_peft(name: str, tmp_path: Path) -> None:
    both_ways(CASES[name], tmp_path)


def test_grouped_convolution_has_no_peft_form_and_keeps_its_own(tmp_path: Path) -> None:
    build = seeded(lambda: Around(nn.Conv2d(4, 6, 3, groups=2)))
    x = floats(2, 4, 5, 5)()
    ours = inlay.attach(build(), DoRA(r=4, targets="inner"))
    randomise(ours)
    inlay.save(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "INLAY"
    expected = run(ours, x, backward=False)
    assert torch.equal(run(inlay.load(build(), tmp_path), x, backward=False), expected)
    inlay.merge(ours)
    torch.testing.assert_close(run(ours, x, backward=False), expected)


def test_places_that_have_no_direction_are_refused() -> None:
    net = tiny.build("mixtral")
    with pytest.raises(UnsupportedError, match="bare parameter"):
        inlay.attach(net, DoRA(r=2, targets="gate_up_proj"))
    with pytest.raises(UnsupportedError, match="lora_bias"):
        inlay.attach(net, DoRA(r=2, targets="q_proj", lora_bias=True))
    assert not any("inlays" in name for name, _ in net.named_modules())
