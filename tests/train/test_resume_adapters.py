"""A stopped and resumed run is the run that was never stopped, for a method of two parts and one of random depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from train.interrupted import assert_resumed_is_the_same

from inlay.train import Run, train

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
    assert_resumed_is_the_same(broken, unbroken, 4, monkeypatch)
