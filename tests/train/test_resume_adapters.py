"""A stopped and resumed run is the run that was never stopped, for a method of two parts and one of random depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from train.test_resume import curve, press_ctrl_c_at, same_adapters

from inlay.train import Interrupted, Run, train

METHODS: list[dict[str, Any]] = [
    {"kind": "mam", "num_virtual_tokens": 2, "projection_size": 4, "bottleneck": 4},
    {"kind": "adapter_plus", "bottleneck": 4, "drop_path": 0.5},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method["kind"]))
def test_a_resumed_run_equals_the_unbroken_one(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    unbroken, broken = (make_run(name, {"num_train_epochs": 2}, method=method) for name in ("unbroken", "broken"))
    train(unbroken, progress=False)
    with monkeypatch.context() as patch:
        press_ctrl_c_at(patch, 4)
        with pytest.raises(Interrupted):
            train(broken, progress=False)
    torch.manual_seed(99)  # a fresh process would not have these states either
    train(broken, resume=True, progress=False)
    assert curve(broken) == curve(unbroken)
    assert same_adapters(broken, unbroken)
