"""`train.activation_budget` where the method is MEFT: the reversible stack is inverted where the budget needs it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from train.interrupted import assert_resumed_is_the_same
from train.test_activations import MODELS, alive_after, gradients
from train.test_cache import collate, features

import inlay
from inlay.errors import ConfigError
from inlay.pieces.reversible.reconstruction import kept
from inlay.train import Run, train
from inlay.train.activations import MECHANISMS, ActivationBudget, StackUnit, measured, plan, units_of

USABLE = [MECHANISMS["recompute"], MECHANISMS["invert"]]
CASES = [("bert", 1, None), ("bert", 3, None), ("llama", 2, None), ("bert", 1, "0-1")]


def prepared(family: str, variant: int, layers: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    method = inlay.MEFT(variant=variant, layers=layers, bottleneck=2)  # type: ignore[arg-type]
    model = inlay.attach(MODELS[family](), method).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    batch = collate(features(family)[:6])
    model.config.use_cache = False  # type: ignore[union-attr, assignment]
    return model, lambda: model(**batch).loss


@pytest.mark.parametrize(("family", "variant", "layers"), CASES)
def test_what_is_predicted_is_what_is_held_and_gradients_stay(family: str, variant: int, layers: Any) -> None:
    model, forward = prepared(family, variant, layers)
    found = measured(model, units_of(model), forward)
    (stack,) = (unit for unit in found.units if isinstance(unit, StackUnit))
    treated = {stack.path: MECHANISMS["invert"].kept(stack)}
    if layers:  # the block above the stack is a unit as ever, with its parts
        above = next(unit for unit in found.units if unit.path.endswith("layer.2"))
        treated[above.path] = MECHANISMS["recompute"].kept(above)
        assert stack.path == "bert.encoder.layer[0-1]"
    least = found.kept(treated)
    made = plan(found, least, USABLE)
    assert made.kept <= least
    assert set(made.treated) == set(treated)
    assert f"1 modules inverted ({stack.path})" in str(made)
    with kept(model):
        loss, wanted = gradients(model, forward)
        before = alive_after(forward)
        with made.applied():
            after = alive_after(forward)
            again, got = gradients(model, forward)
    assert before - after == found.total - made.kept
    assert torch.equal(again, loss)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max(), name
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_nothing_is_inverted_that_fits_and_a_budget_below_the_streams_is_refused() -> None:
    model, _ = prepared("bert", 1, None)
    lines: list[str] = []
    rows = collate(features("bert")[:6])
    trainer: Any = SimpleNamespace(
        adapted=model, args=SimpleNamespace(gradient_checkpointing=False, device=torch.device("cpu"))
    )

    def run(inputs: Any) -> Any:
        return model(**inputs).loss, None

    ActivationBudget(10**9, lines.append)(trainer, run, rows)
    assert lines[-1].endswith("nothing to do")
    found = measured(model, units_of(model), lambda: model(**rows).loss)
    (stack,) = (unit for unit in found.units if isinstance(unit, StackUnit))
    assert 0 < stack.streams < found.total / 4
    ActivationBudget(found.total // 2, lines.append)(trainer, run, rows)
    assert "inverted" in lines[-1]
    with pytest.raises(ConfigError, match=r"activation_budget=1\.0 kB cannot be met: a step keeps at least"):
        ActivationBudget(1000, lines.append)(trainer, run, rows)


def test_a_resumed_run_with_a_budget_is_the_same_run(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"kind": "meft", "variant": 1, "bottleneck": 4, "dropout": 0.1}
    settings = {"activation_budget": "40kB"}
    unbroken, broken = (make_run(out, settings, method=method) for out in ("unbroken", "broken"))
    train(unbroken, progress=False)
    assert_resumed_is_the_same(broken, unbroken, 7, monkeypatch)
