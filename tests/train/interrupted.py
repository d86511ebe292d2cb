"""Runs that are stopped and go on, beside the same runs that were never stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from inlay.train import Interrupted, Run, train
from inlay.train.callbacks import Curve, read_curve


def curve(run: Run) -> list[dict[str, Any]]:
    return read_curve(Path(run.out) / "metrics.jsonl")


def same_adapters(first: Run, second: Run) -> bool:
    a, b = (load_file(Path(run.out) / "adapter" / "adapter_model.safetensors") for run in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def press_ctrl_c_at(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    original = Curve.on_step_end

    def on_step_end(
        self: Curve, args: TrainingArguments, state: TrainerState, control: TrainerControl, **around: Any
    ) -> None:
        original(self, args, state, control, **around)
        if state.global_step == at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Curve, "on_step_end", on_step_end)


def train_until(run: Run, at: int, monkeypatch: pytest.MonkeyPatch, match: str | None = None) -> None:
    """Train, with Ctrl-C pressed after step `at`; `match`: what the run says then."""
    with monkeypatch.context() as patch:
        press_ctrl_c_at(patch, at)
        with pytest.raises(Interrupted, match=match):
            train(run, progress=False)


def assert_resumed_is_the_same(broken: Run, unbroken: Run, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop `broken` after step `at` and go on: the losses, to the bit, and the file of `unbroken`, which has ended."""
    train_until(broken, at, monkeypatch)
    torch.manual_seed(99)  # a fresh process would not have these states either
    train(broken, resume=True, progress=False)
    assert curve(broken) == curve(unbroken)
    assert same_adapters(broken, unbroken)
