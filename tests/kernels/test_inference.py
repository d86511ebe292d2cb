"""Without gradients: the plain formula's numbers in fewer operations, and nothing is computed twice that stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles.plain_formulas import attached, plainly
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.kernels import dora

KINDS = pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])


def pieces(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters at the first linear, by the end of their names."""
    (_, piece), *_ = adapters_of(model).get("default").pieces()
    return dict(piece.named_parameters())


@KINDS
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 40])
def test_half_precision_is_as_near_to_the_truth_as_the_plain_formula(kind: str, rows: int) -> None:
    """Against the same adapter in fp64: no further off, or by no more than two roundings to bf16 (DoRA has two)."""
    model, x = attached(kind).bfloat16(), torch.randn(rows, 6).bfloat16()
    for parameter in adapters_of(model).get("default").parameters():  # as attached to a bf16 base: masters in fp32
        parameter.data = parameter.data.float()
    with torch.no_grad():
        found = model(x).double()
        with plainly():
            plain = model(x).double()
        truth = model.double()(x.double())
    assert (found - truth).norm() <= max(1.1 * (plain - truth).norm(), 2 * 2**-8 * truth.norm())


@KINDS
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_in_training_mode_without_gradients(kind: str, p: float) -> None:
    model, x = attached(kind, **({} if kind == "ia3" else {"dropout": p})), torch.randn(40, 6)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@KINDS
def test_what_comes_in_is_left_alone(kind: str) -> None:
    model, x = attached(kind).eval(), torch.randn(3, 6)
    before = x.clone()
    with torch.no_grad():
        first, second = model(x), model(x)
    assert torch.equal(x, before)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_a_base_that_gives_what_it_keeps_is_not_written_to() -> None:
    class Keeping(nn.Linear):
        """A linear that returns a tensor of its own."""

        def __init__(self) -> None:
            super().__init__(6, 6)
            self.kept = torch.zeros(2, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.kept

    model = nn.Sequential(Keeping())
    inlay.attach(model, inlay.LoRA(r=2, targets="0", init="random"))
    with torch.no_grad():
        assert model(torch.randn(2, 6)).any()
    assert not model[0].kept.any()


# -- DoRA's norm -------------------------------------------------------------------------------------------------------


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each norm that is computed."""
    calls: list[int] = []
    compute = dora.row_norms

    def counted(*arguments: Tensor) -> Tensor:
        calls.append(1)
        return compute(*arguments)

    monkeypatch.setattr(dora, "row_norms", counted)
    return calls


def test_norms_are_computed_once_for_inference_and_at_each_step_of_training(norms: list[int]) -> None:
    model, x = attached("dora"), torch.randn(3, 6)
    norms.clear()
    with torch.no_grad():
        model(x)
        assert len(norms) == 3
        model(x)
        assert len(norms) == 3
    for _ in range(2):
        model(x)
    assert len(norms) == 9


CHANGES: dict[str, Callable[[dict[str, nn.Parameter], nn.Parameter], object]] = {
    "A": lambda own, weight: own["lora_A"].mul_(2),
    "B": lambda own, weight: own["lora_B"].mul_(2),
    "B.data": lambda own, weight: own["lora_B"].data.mul_(2),
    "one number of A": lambda own, weight: own["lora_A"].data[0, 0].add_(1),
    "W": lambda own, weight: weight.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_noticed(change: str, norms: list[int]) -> None:
    model, x = attached("dora"), torch.randn(3, 6)
    before = model(x)
    CHANGES[change](pieces(model), next(m for m in model.modules() if isinstance(m, nn.Linear)).weight)
    after = model(x)
    assert not torch.equal(after, before)
    with plainly():
        torch.testing.assert_close(model(x), after, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_two_scales_of_one_b_are_two_norms() -> None:
    weight, a, b = torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2)
    for scale in (0.5, 2.0, 0.5):
        expected = torch.linalg.vector_norm(weight + scale * b @ a, dim=1)
        torch.testing.assert_close(dora.norms(weight, a, b, scale), expected)
