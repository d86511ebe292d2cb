"""IncreLoRA: the budget is met exactly, growth moves no output, new numbers warm up, a resumed run is the same run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.errors import CheckpointError, ConfigError, TrainingError
from inlay.pieces.lora.growing import RESERVE, GrowingLoRAPiece
from inlay.pieces.lora.rank_growth import RankGrowth

IDS = torch.arange(2, 22).reshape(2, 10)
STEPS = 12
# 4 places of rank 1 become 16 in all: 5 + 5, and then 2 of a reserve of 5. The authors' code would go on to 19.
FIELDS: dict[str, Any] = {
    "target_r": 4, "grow_by": 5, "top_h": 1, "warmup": 2, "interval": 3, "new_warmup": 4, "targets": "query,value",
}  # fmt: skip


def attached(**fields: Any) -> tuple[nn.Module, RankGrowth]:
    torch.manual_seed(0)
    model = inlay.attach(tiny.build("bert").eval(), inlay.IncreLoRA(**(FIELDS | fields)))
    (controller,) = inlay.controllers(model)
    assert isinstance(controller, RankGrowth)
    return model, controller


def optimiser(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.1)


def loss_of(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS).last_hidden_state.pow(3).mean()
    return found


def step(model: nn.Module, controller: RankGrowth, optimizer: torch.optim.Optimizer) -> float:
    torch.manual_seed(controller.step)  # new numbers are drawn from the run's generator, which a resumed run restores
    loss = loss_of(model) + (controller.extra_loss() or 0)
    loss.backward()
    controller.before_step(optimizer)
    optimizer.step()
    controller.after_step(optimizer)
    optimizer.zero_grad()
    return float(loss.detach())


def trained(controller: RankGrowth, model: nn.Module, steps: int) -> list[int]:
    """The rank of the model after each step."""
    controller.prepare(STEPS)
    optimizer, ranks = optimiser(model), []
    for _ in range(steps):
        step(model, controller, optimizer)
        ranks.append(controller.rank)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert held == [id(p) for p in model.parameters() if p.requires_grad]  # all, once each, in the model's order
        assert {id(p) for p in optimizer.state} <= set(held)
    return ranks


# -- the budget --------------------------------------------------------------------------------------------------------


def test_ranks_grow_to_the_target_exactly_and_the_optimiser_has_them_all() -> None:
    model, controller = attached()
    assert trained(controller, model, STEPS) == [4] * 2 + [9] * 3 + [14] * 3 + [16] * 4
    assert [piece.reserve for piece in controller.pieces] == [0] * 4
    assert all(piece.probe is None for piece in controller.pieces)


@pytest.mark.parametrize(("top_h", "grow_by"), [(9, None), (2, 7)])
def test_whatever_the_rounds(top_h: int, grow_by: int | None) -> None:
    model, controller = attached(top_h=top_h, grow_by=grow_by, interval=1)
    ranks = trained(controller, model, STEPS)
    assert ranks == sorted(ranks)
    assert ranks[-1] == 16 == sum(block.numel() for piece in controller.pieces for block in piece.lora_E)


@pytest.mark.parametrize("kind", ["Adafactor", "SGD"])
def test_whatever_the_optimiser(kind: str) -> None:
    """Also one whose state is no number for each entry, when the last reserve is shortened."""
    model, controller = attached(interval=1)
    controller.prepare(STEPS)
    fields = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)((p for p in model.parameters() if p.requires_grad), lr=1e-2, **fields)
    for _ in range(7):
        step(model, controller, optimizer)
    assert controller.rank == 16
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters() if p.requires_grad and p.dim() == 2}


def test_growth_over_by_the_middle_of_the_run_when_nobody_says_when() -> None:
    _, controller = attached(warmup=None, interval=None, top_h=2, grow_by=1)
    controller.prepare(300)
    assert controller.rounds is not None
    assert (len(controller.rounds), controller.rounds[0] > 15, 100 < controller.rounds[-1] <= 160) == (6, True, True)


def test_the_places_that_matter_grow() -> None:
    model, controller = attached(top_h=2, grow_by=1, interval=1)
    controller.prepare(STEPS)
    optimizer = optimiser(model)
    controller.before_step(optimizer)
    controller.sensitivity, controller.uncertainty = torch.tensor([1.0, 4, 2, 9]), torch.tensor([1.0, 2, 9, 1])
    controller.grow(optimizer)
    assert [piece.current_rank for piece in controller.pieces] == [1, 1, 2, 2]  # products 1, 8, 18, 9


def test_importance_is_the_papers_formula() -> None:
    """Against autograd on a ΔW that is formed, at each place by itself, and the averages by hand."""
    model, controller = attached()
    controller.prepare(STEPS)
    optimizer = optimiser(model)
    average, strays = [0.0] * 4, [0.0] * 4
    for _ in range(3):
        twin = copy.deepcopy(model)
        changes = []
        for _, piece in adapters_of(twin).get("default").pieces():
            assert isinstance(piece, GrowingLoRAPiece)
            change = piece.delta().detach().requires_grad_()
            changes.append(change)
            # A LoRA of full rank, whose B is the change and whose A the identity.
            piece.__dict__["factors"] = lambda change=change: (torch.eye(change.shape[1]), change, 1.0)
            piece.probe = None
        loss_of(twin).backward()
        torch.manual_seed(controller.step)
        (loss_of(model)).backward()
        controller.before_step(optimizer)
        optimizer.step()
        controller.step += 1
        controller.score()
        optimizer.zero_grad()
        for n, change in enumerate(changes):
            assert change.grad is not None
            now = float((change.detach() * change.grad).abs().sum()) / 32  # both sides are 32
            average[n] += 0.15 * (now - average[n])
            strays[n] += 0.15 * (abs(now - average[n]) - strays[n])
    torch.testing.assert_close(controller.sensitivity, torch.tensor(average), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(controller.uncertainty, torch.tensor(strays), rtol=1e-4, atol=1e-9)
    assert min(average) > 0


# -- the function ------------------------------------------------------------------------------------------------------


def test_growth_moves_no_output_further_than_the_reserve_can() -> None:
    model, controller = attached()
    controller.prepare(STEPS)
    start = model(IDS).last_hidden_state
    controller.before_step(optimiser(model))  # puts by the first reserves
    assert 0 < (model(IDS).last_hidden_state - start).abs().max() < 1e-5
    for piece in controller.pieces:
        a, b, _ = piece.joined()
        bound = 1.001 * piece.scale * RESERVE * a[1:].norm() * b[:, 1:].norm()
        assert 0 < piece.delta().norm() <= bound
        held = piece.delta()
        piece.admit()
        assert torch.equal(piece.delta(), held)


def test_as_the_authors_scale() -> None:
    sound, theirs = (attached(compat=compat)[1].pieces[0] for compat in (None, "authors"))
    assert (sound.scale, theirs.scale) == (32 / 4, 32 / (1 + 1e-5))
    for piece in (sound, theirs):
        piece.extend(3)
        piece.admit()
    assert (sound.scale, theirs.scale) == (32 / 4, 32 / (4 + 1e-5))


def test_the_extra_loss_is_over_all_blocks_as_one() -> None:
    model, controller = attached(orthogonality=0.3)
    trained(controller, model, 4)
    both = [(torch.cat(list(piece.lora_A)), torch.cat(list(piece.lora_B), 1).t()) for piece in controller.pieces]
    expected = [(rows @ rows.t() - torch.eye(len(rows))).norm() for one in both for rows in one]
    assert max(len(piece.lora_A) for piece in controller.pieces) > 2
    torch.testing.assert_close(controller.extra_loss(), 0.3 * torch.stack(expected).mean())


# -- new numbers -------------------------------------------------------------------------------------------------------


def test_a_share_of_each_step_is_a_share_of_the_learning_rate() -> None:
    """New numbers move as in a group of their own whose rate rises from 0, the old ones as if nothing had come."""
    model, controller = attached()
    controller.prepare(STEPS)
    optimizer = optimiser(model)
    step(model, controller, optimizer)
    piece = controller.pieces[0]
    new, old = piece.lora_A[1], piece.lora_A[0]
    twins = [nn.Parameter(p.detach().clone()) for p in (new, old)]
    theirs = torch.optim.AdamW([{"params": [twins[0]]}, {"params": [twins[1]]}], lr=1e-2, weight_decay=0.1)
    theirs.load_state_dict(
        {
            "state": {1: {key: value.clone() for key, value in optimizer.state[old].items()}},
            "param_groups": theirs.state_dict()["param_groups"],
        }
    )
    rates = []
    for number in range(1, 6):
        rates.append(min(1.0, number / 4))
        theirs.param_groups[0]["lr"] = 1e-2 * rates[-1]
        loss = loss_of(model) + controller.extra_loss()
        gradients = torch.autograd.grad(loss, [new, old])
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient
        step(model, controller, optimizer)
        theirs.step()
        for p, twin in zip((new, old), twins, strict=True):
            torch.testing.assert_close(p.detach(), twin.detach(), rtol=1e-5, atol=1e-7)
    assert rates == [0.25, 0.5, 0.75, 1, 1]


def test_a_schedule_over_the_groups_goes_on() -> None:
    model, controller = attached()
    controller.prepare(STEPS)
    optimizer = optimiser(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 1 / (1 + number))
    for _ in range(STEPS):
        step(model, controller, optimizer)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 13)


# -- files and resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 4, 10])  # before growth, in warm-up, at the target
def test_a_resumed_run_is_the_same_run(at: int, tmp_path: Path) -> None:
    model, controller = attached()
    controller.prepare(STEPS)
    optimizer = optimiser(model)
    for _ in range(at):
        step(model, controller, optimizer)
    inlay.save(model, tmp_path)
    state = copy.deepcopy((controller.state_dict(), optimizer.state_dict()))
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    unbroken = [step(model, controller, optimizer) for _ in range(STEPS - at)]

    other = inlay.load(tiny.build("bert").eval(), tmp_path, trainable=True)
    (resumed,) = inlay.controllers(other)
    assert isinstance(resumed, RankGrowth)
    again = optimiser(other)
    again.load_state_dict(state[1])
    resumed.prepare(STEPS)
    resumed.load_state_dict(state[0])
    assert [step(other, resumed, again) for _ in range(STEPS - at)] == unbroken
    assert [piece.sizes().tolist() for piece in resumed.pieces] == [p.sizes().tolist() for p in controller.pieces]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_ranks_reload_and_are_in_the_summary(tmp_path: Path) -> None:
    model, controller = attached()
    trained(controller, model, STEPS)
    inlay.save(model, tmp_path)
    loaded = inlay.load(tiny.build("bert").eval(), tmp_path)
    assert torch.equal(loaded(IDS).last_hidden_state, model(IDS).last_hidden_state)
    for one in (model, loaded):
        found = inlay.summary(one)
        assert sum(found.rows[0].ranks.values()) == 16
        assert set(found.rows[0].ranks) == {
            f"encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "value")
        }
        assert "16 in all" in str(found)
        assert found.adapter_bytes == 16 * (32 + 32 + 1) * 4


def test_a_file_whose_sizes_do_not_fit(tmp_path: Path) -> None:
    model, controller = attached()
    trained(controller, model, 4)
    inlay.save(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("lora_sizes"))
    for sizes in ([10**9, 0], [1, -1], [], [0, 6]):
        save_file({**tensors, key: torch.tensor(sizes, dtype=torch.int64)}, path)
        with pytest.raises(CheckpointError):
            inlay.load(tiny.build("bert"), tmp_path)


def test_an_adapter_that_is_not_trained_stays_as_it_is(tmp_path: Path) -> None:
    model, controller = attached()
    trained(controller, model, 4)
    inlay.save(model, tmp_path)
    loaded = inlay.load(tiny.build("bert").eval(), tmp_path)
    inlay.attach(loaded, inlay.LoRA(r=2), name="more")
    (frozen,) = inlay.controllers(loaded)
    frozen.prepare(2)  # shorter than its rounds would be
    optimizer = optimiser(loaded)
    loss_of(loaded).backward()
    frozen.before_step(optimizer)
    optimizer.step()
    frozen.after_step(optimizer)
    assert isinstance(frozen, RankGrowth)
    assert [piece.sizes().tolist() for piece in frozen.pieces] == [p.sizes().tolist() for p in controller.pieces]


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="can only grow"):
        inlay.IncreLoRA(init_r=3, target_r=2)
    with pytest.raises(ConfigError, match="choose one of None, authors"):
        inlay.IncreLoRA(compat="author")
    with pytest.raises(ConfigError, match="grow_by=0"):
        inlay.IncreLoRA(grow_by=0)
    model, controller = attached()
    optimizer = optimiser(model)
    with pytest.raises(TrainingError, match="prepare"):
        controller.before_step(optimizer)
    with pytest.raises(ConfigError, match="in 3 rounds, the last of them after step 9 of a run of 9: train longer"):
        controller.prepare(9)
    controller.prepare(STEPS)
    with pytest.raises(TrainingError, match="before_step"):
        controller.after_step(optimizer)
    with pytest.raises(TrainingError, match="this one trains not all of them"):
        controller.before_step(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
