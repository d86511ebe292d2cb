"""LoRA against HF peft: outputs, gradients, and files both ways, on every kind of host."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine import tiny
from oracles.against_peft import Case, both_ways, gradients, randomise, randomised_peft, read_by_peft, run
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay.errors import BaseModelError, CheckpointError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own

LoRA = inlay.LoRA


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder that gives the same eval model each time."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return make().eval()

    return build


def model(name: str, head: str = "trunk", **changes: Any) -> Callable[[], nn.Module]:
    return functools.partial(tiny.build, name, head, **changes)


def ids() -> dict[str, Any]:
    return {"input_ids": torch.arange(2, 22).reshape(2, 10)}


def floats(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"x": torch.linspace(-2, 2, torch.Size(shape).numel()).sin().reshape(shape)}


class Around(nn.Module):
    """One module between two linears that nothing adapts (peft cannot adapt the root itself)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result * 0.5


class Lookup(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 6, **fields)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.table(input_ids)
        return result


class Attend(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


class Experts(nn.Module):
    """Three parameters of one module, in an order that is not the alphabet's, and a 2-D one beside them."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        shapes = {"up": (6, 4), "gate": (6, 4), "down": (4, 6)}
        self.is_transposed = is_transposed
        for name, (rows, columns) in shapes.items():
            rows, columns = (columns, rows) if is_transposed else (rows, columns)
            self.register_parameter(name, nn.Parameter(torch.randn(3, rows, columns) * 0.4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate, down = (p if self.is_transposed else p.transpose(1, 2) for p in (self.up, self.gate, self.down))
        result: torch.Tensor = ((x @ up) * torch.tanh(x @ gate)) @ down
        return result


class Mixing(nn.Module):
    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.experts = Experts(is_transposed)
        self.gate = nn.Module()
        self.gate.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = torch.softmax(x @ self.gate.weight.T, -1).T[:, :, None]
        return (shares * self.experts(x)).sum(0)


def conv(make: Callable[[], nn.Module], *shape: int, r: int = 4, same_file: bool = True) -> Case:
    return Case(seeded(lambda: Around(make())), floats(*shape), {"r": r, "target_modules": ["inner"]},
                LoRA(r=r, alpha=8, targets="inner"), same_file=same_file)  # fmt: skip


def parameters(*names: str, transposed: bool = False) -> Case:
    return Case(seeded(lambda: Mixing(transposed)), floats(5, 4),
                {"r": 2, "target_modules": [], "target_parameters": list(names)},
                LoRA(r=2, alpha=8, targets=list(names)))  # fmt: skip


MOE = ["experts.down_proj", "experts.gate_up_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES: dict[str, Case] = {
    # hosts
    "linear": Case(model("llama", "causal"), ids,
                   {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"},
                   LoRA(r=4, alpha=12, targets="q_proj,down_proj")),
    "conv1d of gpt-2, fused qkv": Case(
        model("gpt2", "causal"), ids, {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        LoRA(r=4, alpha=8, targets="c_attn,c_fc")),
    "embedding": Case(seeded(Lookup), ids, {"r": 3, "target_modules": ["table"]}, LoRA(r=3, alpha=8, targets="table")),
    "embedding with padding": Case(seeded(lambda: Lookup(padding_idx=3)), ids, {"r": 3, "target_modules": ["table"]},
                                   LoRA(r=3, alpha=8, targets="table")),
    "scaled embedding": Case(model("gemma"), ids, {"r": 3, "target_modules": ["embed_tokens"]},
                             LoRA(r=3, alpha=8, targets="embed_tokens")),
    "conv1d": conv(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), 2, 4, 9),
    "conv1d, padding same": conv(lambda: nn.Conv1d(4, 6, 3, padding="same", bias=False), 2, 4, 9),
    "conv2d": conv(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), 2, 4, 7, 6),
    "conv2d 1x1": conv(lambda: nn.Conv2d(4, 6, 1), 2, 4, 3, 3),
    "conv3d": conv(lambda: nn.Conv3d(2, 3, 2, padding=1), 2, 2, 3, 4, 3),
    "multi-head attention": Case(seeded(lambda: Attend(False)), floats(5, 2, 8), {"r": 3, "target_modules": ["attention"]},
                                 LoRA(r=3, alpha=8, targets="attention")),
    "multi-head attention, batch first": Case(
        seeded(lambda: Attend(True)), floats(2, 5, 8), {"r": 3, "target_modules": ["attention"], "lora_dropout": 0.1},
        LoRA(r=3, alpha=8, targets="attention")),
    # parameters
    "2-D parameter": parameters("gate.weight"),
    "3-D parameter": parameters("experts.down"),
    "two parameters of one module": parameters("experts.up", "experts.down"),
    "two parameters, listed the other way": parameters("experts.down", "experts.up"),
    "three parameters and a router": parameters("experts.down", "experts.gate", "experts.up", "gate.weight"),
    "transposed parameters": parameters("experts.up", "experts.down", transposed=True),
    "mixtral": Case(model("mixtral", "causal"), ids, {"r": 2, "target_modules": ["q_proj"], "target_parameters": MOE},
                    LoRA(r=2, alpha=8, targets=["q_proj", *MOE])),
    "qwen2-moe": Case(model("qwen2-moe", "causal"), ids,
                      {"r": 2, "target_modules": [], "target_parameters": [*MOE, "gate.weight"]},
                      LoRA(r=2, alpha=8, targets=[*MOE, "gate.weight"])),
    "qwen3-moe": Case(model("qwen3-moe", "causal"), ids, {"r": 2, "target_modules": [], "target_parameters": MOE},
                      LoRA(r=2, alpha=8, targets=MOE)),
    # ranks and scales
    "rank and alpha patterns": Case(
        model("llama"), ids,
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"],
         "rank_pattern": {"v_proj": 2, "layers.0.self_attn.q_proj": 6, "nowhere": 9},
         "alpha_pattern": {"layers.0.self_attn.v_proj": 5, "down_proj": 3}},
        LoRA(r=4, alpha=8, targets="q_proj,v_proj,down_proj",
             overrides={"layers.0.self_attn.q_proj": {"r": 6}, "layers.0.self_attn.v_proj": {"alpha": 5},
                        "v_proj": {"r": 2}, "ffn.down": {"alpha": 3}})),
    "rank-stabilised, with patterns": Case(
        model("llama"), ids,
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {r".*\.1\..*v_proj": 2},
         "alpha_pattern": {"q_proj": 3}},
        LoRA(r=4, alpha=8, rank_stabilised=True, targets="q_proj,v_proj",
             overrides={"re:.*1.*v_proj": {"r": 2}, "q_proj": {"alpha": 3}})),
    "patterns on parameters": Case(
        model("mixtral"), ids, {"r": 2, "target_modules": [], "target_parameters": MOE, "rank_pattern": {"down_proj": 3},
                                "alpha_pattern": {"experts.gate_up_proj": 5}},
        LoRA(r=2, alpha=8, targets=MOE, overrides={"down_proj": {"r": 3}, "gate_up_proj": {"alpha": 5}})),
    "patterns on attention": Case(
        seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), lambda: {"src": floats(2, 5, 8)()["x"]},
        {"r": 2, "target_modules": ["self_attn", "linear1"], "rank_pattern": {"self_attn": 3}},
        LoRA(r=2, alpha=8, targets="self_attn,linear1", overrides={"self_attn": {"r": 3}})),
    # biases and whole modules
    "every bias": Case(model("bert"), ids, {"r": 2, "target_modules": ["query"], "bias": "all"},
                       LoRA(r=2, alpha=8, targets="query", bias="all")),
    "biases of adapted modules": Case(model("bert"), ids, {"r": 2, "target_modules": ["query"], "bias": "lora_only"},
                                      LoRA(r=2, alpha=8, targets="query", bias="lora_only")),
    "bias on B": Case(model("bert"), ids, {"r": 2, "target_modules": ["query"], "lora_bias": True},
                      LoRA(r=2, alpha=8, targets="query", lora_bias=True)),
    "nested head of roberta": Case(
        model("roberta", "sequence"), ids, {"r": 2, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"},
        LoRA(r=2, alpha=8, targets="query,dense", exclude="classifier")),
    "heads of distilbert": Case(
        model("distilbert", "sequence"), ids,
        {"r": 2, "target_modules": ["q_lin"], "modules_to_save": ["pre_classifier", "classifier"]},
        LoRA(r=2, alpha=8, targets="q_lin")),
    "a module beside": Case(model("llama", "causal"), ids,
                            {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
                            LoRA(r=2, alpha=8, targets="q_proj"), modules_to_save=["lm_head"]),
    "every bias and a head": Case(model("bert", "sequence"), ids,
                                  {"r": 2, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
                                  LoRA(r=2, alpha=8, targets="query", bias="all"), same_file=False),
    # targets
    "all-linear": Case(model("llama", "causal"), ids, {"r": 2, "target_modules": "all-linear"},
                       LoRA(r=2, alpha=8, targets="all-linear")),
    "regular expression": Case(model("llama"), ids, {"r": 2, "target_modules": r"layers\.[01]\..*(q|v)_proj"},
                               LoRA(r=2, alpha=8, targets="q_proj,v_proj")),
    "exclusions": Case(model("llama"), ids, {"r": 2, "target_modules": EVERY, "exclude_modules": ["o_proj", "nowhere"]},
                       LoRA(r=2, alpha=8, targets="all-linear", exclude="o_proj")),
    "excluding by expression": Case(model("llama"), ids, {"r": 2, "target_modules": EVERY, "exclude_modules": ".*mlp.*"},
                                    LoRA(r=2, alpha=8, targets="attention")),
    "some layers": Case(model("llama", "causal"), ids,
                        {"r": 2, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
                        LoRA(r=2, alpha=8, targets="q_proj,up_proj", layers=1)),
    "layers of a named stack": Case(
        model("t5", "conditional"), lambda: ids() | {"decoder_input_ids": torch.arange(8).reshape(2, 4)},
        {"r": 2, "target_modules": ["q", "wo"], "layers_to_transform": 1, "layers_pattern": "block"},
        LoRA(r=2, alpha=8, targets="q,wo", layers=1)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*vocabulary was not modified")
@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_files_are_those_of_peft(name: str, tmp_path: Path) -> None:
    both_ways(CASES[name], tmp_path)
