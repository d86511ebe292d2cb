"""A run with the density loss beside LoRA: it is called for, its gates are saved, and a resumed run is the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from train.interrupted import assert_resumed_is_the_same, curve

from inlay.train import Run, train


def test_a_resumed_run_with_the_density_loss_is_the_same_run(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = [{"kind": "lora", "r": 2}, {"kind": "density", "adaptive": True, "eps": 0.01}]
    plain = make_run("plain")
    unbroken, broken = (make_run(name, method=methods) for name in ("unbroken", "broken"))
    for run in (plain, unbroken):
        train(run, progress=False)
    first, with_term = (next(line["loss"] for line in curve(run) if "loss" in line) for run in (plain, unbroken))
    assert 0.5 < with_term - first <= 1  # a GELU is dense at the start
    assert_resumed_is_the_same(broken, unbroken, 7, monkeypatch)
    tensors = load_file(Path(unbroken.out) / "adapter" / "adapter_model.safetensors")
    gates = [tensor for key, tensor in tensors.items() if key.endswith(".gate")]
    assert len(gates) == 2
    assert all(gate != 1 for gate in gates)
