"""AdaLoRA's budget: met exactly, as HF peft allocates where nothing ties, kept over a resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine import tiny
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, TrainingError
from inlay.pieces.lora.rank_budget import RankBudget

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(2, 22).reshape(2, 10)
STEPS = 8
FIELDS: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "targets": "query,value"}


def attached(**fields: Any) -> tuple[nn.Module, RankBudget]:
    torch.manual_seed(0)
    model = inlay.attach(tiny.build("bert"), inlay.AdaLoRA(**(FIELDS | fields)))
    (controller,) = inlay.controllers(model)
    assert isinstance(controller, RankBudget)
    return model, controller


def pieces(model: nn.Module) -> list[Any]:
    return [piece for _, piece in adapters_of(model).get("default").pieces()]


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)


def step(model: nn.Module, controller: RankBudget, optimizer: torch.optim.Optimizer) -> int:
    """One step of training; how many triplets are left after it."""
    loss = model(IDS).last_hidden_state.square().mean() + (controller.extra_loss() or 0)
    loss.backward()
    optimizer.step()
    controller.after_step(optimizer)
    optimizer.zero_grad()
    return sum(int(piece.lora_E.count_nonzero()) for piece in pieces(model))


def test_the_budget_begins_and_ends_where_it_should_and_never_grows() -> None:
    _, controller = attached()
    controller.prepare(STEPS)
    budgets = [controller.budget(number) for number in range(STEPS + 1)]
    assert budgets[:2] == [16, 16]
    assert budgets[STEPS - 2 :] == [8, 8, 8]
    assert budgets == sorted(budgets, reverse=True)


def test_after_each_allocation_as_many_are_left_as_the_budget_says() -> None:
    model, controller = attached()
    controller.prepare(STEPS)
    optimizer = optimiser(model)
    for number in range(1, STEPS + 1):
        assert step(model, controller, optimizer) == controller.budget(number)
    assert sum(int(piece.kept.sum()) for piece in pieces(model)) == 8


def test_ties_do_not_overshoot() -> None:
    _, controller = attached()
    controller.prepare(STEPS)
    for number in range(len(controller.pieces)):
        for name in ("lora_A", "lora_B", "lora_E"):
            same = torch.ones_like(getattr(controller.pieces[number], name))
            controller.sensitivity[f"{number}.{name}"] = controller.uncertainty[f"{number}.{name}"] = same
    controller.allocate(5)
    assert [piece.kept.tolist() for piece in controller.pieces[:2]] == [[True] * 4, [True, False, False, False]]
    assert sum(int(piece.kept.sum()) for piece in controller.pieces) == 5


def test_orthonormal_rows_cost_nothing() -> None:
    model, controller = attached()
    with torch.no_grad():
        for piece in pieces(model):
            nn.init.orthogonal_(piece.lora_A)
            nn.init.orthogonal_(piece.lora_B)
    loss = controller.extra_loss()
    assert loss is not None
    assert loss < 1e-5
    assert attached(orthogonality=1e-9)[1].extra_loss() is not None


def test_as_hf_peft_allocates() -> None:
    """The same numbers and gradients, step by step, through peft's allocator."""
    model, controller = attached()
    controller.prepare(STEPS)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, total_step=STEPS, target_modules=["query", "value"]
    )
    theirs = peft.get_peft_model(tiny.build("bert"), config).base_model
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for site, piece in adapters_of(model).get("default").pieces():
            for name in ("lora_A", "lora_B", "lora_E"):
                named[f"model.{site.path}.{name}.default"].copy_(piece.get_parameter(name))
    allocator = RankAllocator(theirs, config, "default")
    generator = torch.Generator().manual_seed(3)
    for number in range(1, STEPS - 1):
        for site, piece in adapters_of(model).get("default").pieces():
            for name in ("lora_A", "lora_B", "lora_E"):
                ours = piece.get_parameter(name)
                move, gradient = (torch.randn(ours.shape, generator=generator) for _ in range(2))
                for parameter in (ours, named[f"model.{site.path}.{name}.default"]):
                    parameter.data.add_(move)
                    parameter.grad = gradient.clone()
        controller.after_step(optimiser(model))
        allocator.update_and_allocate(theirs, number, force_mask=number == STEPS - 2)
        for site, piece in adapters_of(model).get("default").pieces():
            expected: Tensor = named[f"model.{site.path}.lora_E.default"]
            assert torch.equal(piece.get_parameter("lora_E"), expected), number


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    model, controller = attached()
    controller.prepare(STEPS)
    optimizer = optimiser(model)
    for _ in range(4):
        step(model, controller, optimizer)
    inlay.save(model, tmp_path)
    state = copy.deepcopy((controller.state_dict(), optimizer.state_dict()))
    unbroken = [step(model, controller, optimizer) for _ in range(4)]
    other = inlay.load(tiny.build("bert"), tmp_path, trainable=True)
    (resumed,) = inlay.controllers(other)
    assert isinstance(resumed, RankBudget)
    resumed.prepare(STEPS)
    resumed.load_state_dict(state[0])
    again = optimiser(other)
    again.load_state_dict(state[1])
    assert [step(other, resumed, again) for _ in range(4)] == unbroken
    for one, two in zip(pieces(model), pieces(other), strict=True):
        assert torch.equal(one.lora_E, two.lora_E)
        assert torch.equal(one.lora_A, two.lora_A)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")  # but they do
def test_a_pruned_file_of_peft(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["query"])
    theirs = peft.get_peft_model(tiny.build("bert"), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
            if "lora_E" in name:
                parameter[1:3] = 0
    rows = [name for name, _ in theirs.named_parameters() if "lora_E" in name]
    mask = {name.replace("base_model.model.", "").replace(".default", ""): [True, False, False, True] for name in rows}
    theirs.peft_config["default"].rank_pattern = mask
    expected = theirs(IDS).last_hidden_state
    theirs.save_pretrained(tmp_path / "theirs")
    ours = inlay.load(tiny.build("bert"), tmp_path / "theirs")
    assert {len(piece.lora_E) for piece in pieces(ours)} == {2}
    torch.testing.assert_close(ours(IDS).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    inlay.save(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny.build("bert"), tmp_path / "ours")
    torch.testing.assert_close(back(IDS).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    again = inlay.load(tiny.build("bert"), tmp_path / "ours")
    assert torch.equal(again(IDS).last_hidden_state, ours(IDS).last_hidden_state)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="can only shrink"):
        inlay.AdaLoRA(init_r=2, target_r=3)
    model, controller = attached()
    with pytest.raises(TrainingError, match="prepare"):
        controller.after_step(optimiser(model))
    with pytest.raises(ConfigError, match="of the run's 3 steps none is left"):
        controller.prepare(3)
    controller.prepare(STEPS)
    with pytest.raises(TrainingError, match="before zero_grad"):
        controller.after_step(optimiser(model))
