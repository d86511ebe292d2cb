"""Who shares what in Lily, and files that say otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.tiny import build
from properties.models import perturb
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import CheckpointError, ConfigError

IDS = torch.arange(2, 22).reshape(2, 10)


def adapted(name: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return perturb(inlay.attach(build(name, "trunk").eval(), inlay.Lily(r=2, **fields)))


def numbers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Which A and which B each place has."""
    return {site.path: (piece.a, piece.b) for site, piece in adapters_of(model).get("default").pieces()}


def test_neighbours_share_a_and_a_group_shares_b() -> None:
    found = numbers(adapted("t5", stride_A=4, targets="query,up"))
    queries = [pair for path, pair in found.items() if path.endswith(".q")]
    ups = [pair for path, pair in found.items() if path.endswith(".wi")]
    assert [pair[0] == queries[0][0] for pair in queries] == [True] * 4 + [False] * 2
    assert queries[4] == queries[5]
    assert len({b for _, b in queries}) == len(set(ups)) == 1
    assert not set(queries) & set(ups)


def test_places_of_one_name_and_unlike_shapes_share_nothing() -> None:
    found = numbers(adapted("bert", targets="output,ffn", stride_A=9))  # all are called dense
    assert len(set(found.values())) == 3


def test_the_same_places_by_other_names(tmp_path: Path) -> None:
    model = adapted("bert", targets="query,key", sharing=["self.query", "self.key"])
    assert numbers(model) == numbers(adapted("bert", targets="query,key"))
    inlay.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["target_modules"]) == ("LILY", ["self.key", "self.query"])


@pytest.mark.parametrize(
    ("targets", "sharing"), [("output,pooler", ["dense"]), ("query,key", ["y"]), ("query", ["0.x"])]
)
def test_what_peft_would_share_otherwise_is_our_own_file(targets: str, sharing: list[str], tmp_path: Path) -> None:
    model = adapted("bert", targets=targets, sharing=sharing)
    inlay.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "INLAY"
    back = inlay.load(build("bert", "trunk").eval(), tmp_path)
    assert numbers(back) == numbers(model)
    with torch.no_grad():
        assert torch.equal(back(IDS)[0], model(IDS)[0])


def test_a_file_with_two_values_for_one_tensor_is_refused(tmp_path: Path) -> None:
    inlay.save(adapted("bert"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("lily_B.weight"))
    save_file({**tensors, key: tensors[key] + 1}, path)
    bare = build("bert", "trunk")
    with pytest.raises(CheckpointError, match=r"one tensor here and differ.*stride_A"):
        inlay.load(bare, tmp_path)
    assert inlay.engine.adapters.find_adapters(bare) is None


def test_what_cannot_be() -> None:
    for fields in ({"num_B": 1}, {"stride_A": 0}, {"overrides": {"query": {"r": 4}}}):
        bare = build("bert", "trunk")
        with pytest.raises(ConfigError, match="Lily"):
            inlay.attach(bare, inlay.Lily(**fields))
        assert inlay.engine.adapters.find_adapters(bare) is None


def test_no_rows_leave_no_trace_in_the_gradients() -> None:
    model = inlay.attach(nn.ModuleDict({"q_proj": nn.Linear(4, 6)}), inlay.Lily(r=2, targets="q_proj"))
    x = torch.randn(3, 4)
    (model["q_proj"](x).square().sum() + model["q_proj"](x[:0]).sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
