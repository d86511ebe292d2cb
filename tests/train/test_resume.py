"""A run stopped and resumed is the run that was never stopped: the same losses, to the bit, and the same file."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train.interrupted import curve, same_adapters, train_until

from inlay.engine.controller import Controller
from inlay.errors import ConfigError, DataError, TrainingError
from inlay.tasks.text_classification import TextClassification
from inlay.train import Run, train
from inlay.train import trainer as trainer_module
from inlay.train.checkpoints import checkpoints, step_of


def let_collators_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every collator turns a fifth of the tokens into others, drawn from torch's global generator."""
    make = TextClassification.collator

    def collator(self: TextClassification, *around: Any) -> Any:
        collate = make(self, *around)

        def drawing(features: list[dict[str, Any]]) -> Any:
            batch = collate(features)
            ids = batch["input_ids"]
            return {**batch, "input_ids": torch.where(torch.rand(ids.shape) < 0.2, torch.randint_like(ids, 5, 12), ids)}

        return drawing

    monkeypatch.setattr(TextClassification, "collator", collator)


@pytest.mark.parametrize(
    ("at", "task", "train_settings", "drawing"),
    [
        (3, "text-classification", {}, False),  # in the first epoch
        (5, "text-classification", {}, False),  # at its end
        (8, "text-classification", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, False),
        (7, "masked-lm", {"lr_scheduler_type": "cosine", "weight_decay": 0.1}, False),
        (7, "text-classification", {}, True),
    ],
)
def test_a_resumed_run_equals_the_unbroken_one(
    make_run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    task: str,
    train_settings: dict[str, Any],
    drawing: bool,
) -> None:
    if drawing:  # what transformers' own resume gets wrong: batches are fetched before the random states are restored
        let_collators_draw(monkeypatch)
    unbroken = make_run("unbroken", train_settings, task=task)
    broken = make_run("broken", train_settings, task=task)
    whole = train(unbroken, progress=False)
    said = rf"stopped at step {at} of 15, with a checkpoint; go on with: inlay train --resume"
    train_until(broken, at, monkeypatch, match=said)
    assert [step_of(path) for path in checkpoints(Path(broken.out) / "checkpoints")] == [at]
    torch.manual_seed(99)  # a fresh process would not have these states either
    resumed = train(broken, resume=True, progress=False)
    assert curve(broken) == curve(unbroken)
    assert len([line for line in curve(broken) if "loss" in line]) == 15
    assert len([line for line in curve(broken) if "validation" in line]) == 3
    assert same_adapters(broken, unbroken)
    assert resumed.metrics == whole.metrics
    assert (resumed.best_step, resumed.steps) == (whole.best_step, whole.steps)


def test_a_checkpoint_holds_no_base_weights(make_run: Callable[..., Run], tiny_model: Path) -> None:
    run = make_run()
    train(run, progress=False)
    [last] = checkpoints(Path(run.out) / "checkpoints")
    assert step_of(last) == 15
    names = set(load_file(last / "adapter_model.safetensors"))
    assert all(any(part in name for part in ("lora_", "classifier", "pooler")) for name in names)
    assert not list(Path(run.out).rglob("model.safetensors"))
    base = (tiny_model / "model.safetensors").stat().st_size
    assert (last / "adapter_model.safetensors").stat().st_size < base / 2
    assert not list(Path(run.out).rglob(".*"))


KILLED_IN_A_SAVE = """
import os, signal, sys
import torch
from inlay.train import Run, train
save, count = torch.save, 0
def torn(state, place, *args, **kwargs):
    global count
    count += str(place).endswith("scheduler.pt")
    if count == 2:  # the second checkpoint, after its adapter and optimiser were written
        os.kill(os.getpid(), signal.SIGKILL)
    return save(state, place, *args, **kwargs)
torch.save = torn
train(Run.from_yaml(sys.argv[1]), progress=False)
"""


def test_kill_9_in_the_middle_of_a_save_goes_on_from_the_checkpoint_before(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    unbroken, broken = make_run("unbroken"), make_run("broken")
    train(unbroken, progress=False)
    (tmp_path / "broken.yaml").write_text(broken.to_yaml())
    command = [sys.executable, "-c", KILLED_IN_A_SAVE, str(tmp_path / "broken.yaml")]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    assert [step_of(path) for path in checkpoints(Path(broken.out) / "checkpoints")] == [5]
    train(broken, resume=True, progress=False)
    assert curve(broken) == curve(unbroken)
    assert same_adapters(broken, unbroken)
    assert not list((Path(broken.out) / "checkpoints").glob(".*"))


class Recorder(Controller):
    """Writes down how it is called, and adds a term to the loss that depends on what it has seen."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.seen = 0

    def prepare(self, total_steps: int) -> None:
        self.calls.append(f"prepare {total_steps}")

    def extra_loss(self) -> torch.Tensor:
        return torch.tensor(float(self.seen))

    def before_step(self, optimizer: Any) -> None:
        self.calls.append("before")
        assert any(p.grad is not None for group in optimizer.param_groups for p in group["params"])

    def after_step(self, optimizer: Any) -> None:
        self.calls.append("after")
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.append("load")
        self.seen = state["seen"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_controllers_are_called_saved_and_restored(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    sizes = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 8 // accumulate}
    plain, watched, broken = (make_run(name, sizes) for name in ("plain", "watched", "broken"))
    train(plain, progress=False)
    recorder = Recorder()
    monkeypatch.setattr(trainer_module, "controllers", lambda model: [recorder])
    train(watched, progress=False)
    assert recorder.calls == ["prepare 15"] + ["before", "after"] * 15
    # A constant term has no gradient: the losses are those of the plain run plus the steps seen so far, whole, however
    # many batches a step accumulates. Float32 sums of up to 15 differ from float64 ones by less than 1e-5.
    losses = [(a["loss"], b["loss"]) for a, b in zip(curve(plain), curve(watched), strict=True) if "loss" in a]
    for step, (without, with_term) in enumerate(losses):
        assert with_term == pytest.approx(without + step, abs=1e-5)
    recorder = Recorder()
    train_until(broken, 7, monkeypatch)
    recorder = Recorder()
    train(broken, resume=True, progress=False)
    assert recorder.calls == ["prepare 15", "load"] + ["before", "after"] * 8
    assert curve(broken) == curve(watched)


def test_resuming_another_run_is_refused(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    train_until(run, 2, monkeypatch)
    with pytest.raises(ConfigError, match=r"where method\.r is 2, not 4"):
        train(make_run(method={"kind": "lora", "r": 4}), resume=True)
    with pytest.raises(ConfigError, match=r"where train\.learning_rate is 0\.01, not 0\.5"):
        train(make_run(train={"learning_rate": 0.5}), resume=True)
    with pytest.raises(ConfigError, match=r"already holds a run .*--resume to go on with it"):
        train(run)
    train(run, resume=True, progress=False)
    with pytest.raises(TrainingError, match="has ended"):
        train(run, resume=True)
    with pytest.raises(ConfigError, match=r"already holds a run .*--overwrite to replace it$"):
        train(run)


def test_a_new_run_never_mixes_with_what_is_there(make_run: Callable[..., Run]) -> None:
    run = make_run()
    out = Path(run.out)
    out.mkdir()
    (out / "README.md").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds README\.md, which no run left there"):
            train(run, overwrite=overwrite)
    (out / "README.md").unlink()
    (out / "mine.txt").write_text("mine")
    train(run, progress=False)
    with pytest.raises(DataError):
        train(make_run(columns={"text": "nowhere"}), overwrite=True)
    assert (out / "record.json").exists()  # a run that cannot start takes nothing away
    train(make_run(train={"max_steps": 1}), overwrite=True, progress=False)
    assert len(curve(run)) == 2
    assert (out / "mine.txt").read_text() == "mine"


def test_there_must_be_something_to_resume(make_run: Callable[..., Run]) -> None:
    with pytest.raises(TrainingError, match=r"there is no run in .* to resume"):
        train(make_run("nowhere"), resume=True)
