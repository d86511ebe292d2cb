"""A run with MonteCLoRA: its loss is added, and a resumed run draws what the unbroken one draws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from train.interrupted import assert_resumed_is_the_same, curve

from inlay.train import Run, train


def test_a_resumed_run_draws_the_same_noise(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = {"kind": "monteclora", "r": 2, "sample_scaler": 0.1, "num_samples": 4, "use_entropy": True}
    short = {"num_train_epochs": 1}
    plain, unbroken = make_run("plain", short), make_run("unbroken", short, method=[noisy])
    broken = make_run("broken", short, method=[noisy])
    for run in (plain, unbroken):
        train(run, progress=False)
    first, with_term = (next(line["loss"] for line in curve(run) if "loss" in line) for run in (plain, unbroken))
    assert 1 / 4 < with_term - first < 1.01  # Σ w² of four shares, and divergences at 1e-5
    assert_resumed_is_the_same(broken, unbroken, 2, monkeypatch)
