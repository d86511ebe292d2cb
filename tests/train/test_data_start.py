"""LoRA that starts from the run's own rows: found before training, written with the adapter, not looked for again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from train.interrupted import same_adapters, train_until

from inlay import LoRA
from inlay.train import Run, train
from inlay.train.prepare import prepare, training_batches

METHOD = {"kind": "lora", "r": 2, "targets": "query,ffn.down", "init": {"kind": "eva", "rho": 2, "batches": 2}}


def test_a_run_starts_from_its_own_rows(make_run: Callable[..., Run]) -> None:
    ready = prepare(make_run(method=METHOD), show=False)
    (bare,), (shown,) = ready.methods, prepare(make_run(method=METHOD)).methods
    assert isinstance(bare, LoRA)
    assert bare.wants_data
    assert isinstance(shown, LoRA)
    expected: Any = bare.prepare(ready.model, list(training_batches(ready)())[:2])
    assert shown.overrides == expected.overrides
    found: Any = shown.init
    assert found.found.keys() == expected.init.found.keys()
    assert all(torch.equal(a, expected.init.found[name][0]) for name, (a, _) in found.found.items())


def test_a_resumed_run_does_not_look_again(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no"}
    whole, broken = (make_run(name, method=METHOD, train=settings) for name in ("whole", "broken"))
    train(whole, progress=False)
    train_until(broken, 2, monkeypatch)

    def never(*_: object) -> None:
        raise AssertionError("the start is in the checkpoint")

    monkeypatch.setattr(LoRA, "prepare", never)
    train(broken, resume=True, progress=False)
    assert same_adapters(broken, whole)
