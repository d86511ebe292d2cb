"""DoRA's autograd function and its expanded norm against the plain formula, and what the function keeps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from oracles import plain_formulas as references
from oracles.plain_formulas import SCALE, close, gradients, kept, leaf, same_mask, size, twin
from torch import Tensor, nn

import inlay
from inlay.engine.adapters import adapters_of
from inlay.engine.linear import Linear
from inlay.kernels import dora as kernel
from inlay.kernels import dropout
from inlay.kernels.dora import MagnitudeLinear, row_norms

T, IN, OUT, R = 7, 5, 4, 3
BOTH = torch.autograd.gradcheck, torch.autograd.gradgradcheck


def operands(
    *shape: int, dtype: torch.dtype = torch.float32, needs: tuple[bool, ...] = (True,) * 5, out: int = OUT
) -> list[Tensor]:
    """x, W (frozen), b, A, B, m."""
    shape = shape or (T, IN)
    needs = (needs[0], False, *needs[1:])
    sizes = [shape, (out, shape[-1]), (out,), (R, shape[-1]), (out, R)]
    tensors = [leaf(*one, dtype=dtype, grad=need) for one, need in zip(sizes, needs, strict=False)]
    magnitude = (0.5 + torch.rand(out, dtype=dtype)).requires_grad_(needs[5])
    return [*tensors, magnitude]


def fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    mask: Tensor | None = None,
    *,
    whole: bool = False,
    norms: Tensor | None = None,
) -> Tensor:
    if norms is None:
        norms = row_norms(weight.detach(), a.detach(), b.detach(), SCALE)
    arguments = (x, weight, bias, a, b, magnitude, norms, SCALE, x.dtype, mask, not whole)
    result: Tensor = MagnitudeLinear.apply(*arguments)
    return result


def adapted(tensors: list[Any], p: float = 0.0) -> Tensor:
    """By way of what chooses whether to keep the output or the direction."""
    x, weight, bias, a, b, magnitude = tensors
    y = kernel.adapted(Linear(weight, bias, weight.dtype), x, a, b, magnitude, SCALE, p)
    assert y is not None
    return y


def masked(kind: str, x: Tensor) -> Tensor | None:
    if kind == "none":
        return None
    return dropout.draw(x.shape, 0.4, torch.device("cpu")) if kind == "packed" else torch.rand(x.shape) >= 0.4


# -- values and derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "packed", "bool"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_both_derivatives_are_those_of_finite_differences(mask: str, bias: bool, whole: bool) -> None:
    x, weight, b0, a, b, magnitude = operands(2, 3, IN, dtype=torch.float64)
    drop = masked(mask, x)
    norms = row_norms(weight, a.detach(), b.detach(), SCALE)

    def function(*t: Tensor) -> Tensor:
        return fused(t[0], weight, *t[1:], drop, whole=whole, norms=norms)

    for check in BOTH:
        assert check(function, (x, b0 if bias else None, a, b, magnitude))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=5))[:-1])
@pytest.mark.parametrize("mask", ["none", "packed"])
@pytest.mark.parametrize("whole", [True, False])
def test_every_choice_of_what_is_trained_gives_the_same_gradients(
    needs: tuple[bool, ...], mask: str, whole: bool
) -> None:
    tensors = operands(dtype=torch.float64, needs=needs)
    drop = masked(mask, tensors[0])
    alone = [twin(t) for t in tensors]
    y, truth = fused(*tensors, drop, whole=whole), references.dora(*alone, drop)
    close(y, truth, 16)
    for one, other in zip(gradients(y, *tensors), gradients(truth, *alone), strict=True):
        close(one, other, 64)  # dm divides y, which lost a rounding, by m / n of 0.5 at least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "packed"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_the_plain_formula_to_rounding(dtype: torch.dtype, mask: str, bias: bool) -> None:
    tensors: list[Any] = operands(3, 5, 4, 40, out=24)
    tensors = [t.detach().to(dtype if i < 3 else torch.float32).requires_grad_(i != 1) for i, t in enumerate(tensors)]
    if not bias:
        tensors[2] = None
    drop = masked(mask, tensors[0])
    alone = [twin(t) for t in tensors]
    y, truth = fused(*tensors, drop), references.dora(*alone, drop)
    assert y.dtype == dtype
    close(y, truth, 8)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    for tensor, one, other in zip(wanted, gradients(y, *tensors), gradients(truth, *alone), strict=True):
        assert one.dtype == tensor.dtype
        close(one, other, 16, dtype)


@pytest.mark.parametrize("wrong", ["a", "b", "magnitude"])
def test_an_error_of_a_thousandth_is_seen(wrong: str) -> None:
    tensors = operands(20, IN)
    alone = [twin(t) for t in tensors]
    close(fused(*tensors), references.dora(*alone), 16)
    alone[{"a": 3, "b": 4, "magnitude": 5}[wrong]].data *= 1.001
    with pytest.raises(AssertionError, match="is more than"):
        close(fused(*tensors), references.dora(*alone), 16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factor", [0.01, 0.1, 0.5, 2.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dm_holds_whatever_the_size_of_the_factor(factor: float, dtype: torch.dtype, bias: bool) -> None:
    """m far from ‖V‖ leaves in y what dm is made of, beside a bias of the size of x."""
    x, weight, b0, a, b, magnitude = (t.detach() for t in operands(200, 40, out=24))
    x, weight, b0 = x.to(dtype), weight.to(dtype), b0.to(dtype) if bias else None
    norms = row_norms(weight, a, b, SCALE)
    magnitude = (1.03 * factor * norms).requires_grad_()
    y = adapted([x, weight, b0, a, b, magnitude])
    exact = [twin(t) for t in (x, weight, b0, a, b, magnitude)]
    (dm,), (truth,) = gradients(y, magnitude), gradients(references.dora(*exact), *exact)
    # 1e-4 and 5 %: above what the rounding of y costs, in fp32 and in bf16, while m / n is of order one.
    close(dm, truth, (1e-4 if dtype == torch.float32 else 0.05) / torch.finfo(dtype).eps, dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-20, 1e-13, 1e-11, 1e-9, 1e-7, 1e-5, -0.5])
def test_a_magnitude_of_nearly_nothing_has_the_right_gradients(value: float, bias: bool) -> None:
    """Where m is zero the output says nothing of the direction, yet dm is Σ dy ⊙ u / n all the same."""
    tensors: list[Any] = operands(30, IN)
    tensors[2] = tensors[2].detach() * 10 if bias else None
    tensors[5].data[1] = value
    alone = [twin(t) for t in tensors]
    y = adapted(tensors)
    truth = references.dora(*alone)
    close(y, truth, 16)
    for one, other in zip(gradients(y, *tensors), gradients(truth, *alone), strict=True):
        # 1e-4: far above what rounding does, far below an output's dm that drowned in its bias.
        close(one, other, 1e-4 / torch.finfo(torch.float32).eps)


def test_an_output_whose_weights_are_all_zero_stays_what_it_was() -> None:
    host = nn.Linear(IN, OUT)
    with torch.no_grad():
        host.weight[2] = 0
    x = torch.randn(T, IN, requires_grad=True)
    before = host.requires_grad_(False)(x)
    model = inlay.attach(nn.Sequential(host), inlay.DoRA(r=R, alpha=R * SCALE, targets="0"))
    y = model(x)
    assert torch.equal(y, before)
    ((_, piece),) = adapters_of(model).get("default").pieces()
    own = (piece.lora_A, piece.lora_B, piece.magnitude)
    found = gradients(y, *own)
    assert all(g.isfinite().all() for g in found)
    assert found[2][2] == 0
    with torch.no_grad():
        piece.lora_B[2] = 0.3
        piece.magnitude[2] = 0.2
    alone = [twin(t) for t in (x, host.weight, host.bias, *own)]
    truth = references.dora(*alone)
    close(model(x), truth, 16)
    for one, other in zip(gradients(model(x), x, *own), gradients(truth, alone[0], *alone[3:]), strict=True):
        close(one, other, 64)


def test_dropout_scales_up_what_it_leaves() -> None:
    """x̃ / (1 − p), as everywhere: with the mask drawn again from the same state, by the plain formula."""
    x, weight, bias, a, b, magnitude = tensors = operands(T, IN, dtype=torch.float64)
    state = torch.get_rng_state()
    y = adapted(tensors, 0.4)
    torch.set_rng_state(state)
    mask = dropout.draw(x.shape, 0.4, torch.device("cpu"))
    norms = (weight + SCALE * b @ a).detach().norm(dim=1)
    change = SCALE * same_mask(x, mask) / 0.6 @ a.t() @ b.t()
    close(y, magnitude / norms * (x @ weight.t() + change) + bias, 16)


def test_dropout_keeps_the_mean() -> None:
    x, *rest = (t.detach() for t in operands(1, IN, dtype=torch.float64))
    expected, many = adapted([x, *rest]), adapted([x.expand(40_000, IN), *rest], 0.4)
    deviations = (many.mean(0) - expected[0]) / (many.std(0) / math.sqrt(40_000))
    assert float(deviations.abs().max()) < 4.5


# -- where it starts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(33,), (1, 33), (9, 33), (2, 3, 33)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_it_starts_as_the_base_bit_for_bit(dtype: torch.dtype, bias: bool, shape: tuple[int, ...], p: float) -> None:
    host = nn.Linear(33, 17, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(*shape).to(dtype)
    before = host(x)
    model = inlay.attach(nn.Sequential(host), inlay.DoRA(r=R, targets="0", dropout=p)).train()
    assert torch.equal(model(x), before)
    y = model(x.requires_grad_())
    assert y.requires_grad
    assert torch.equal(y, before)


# -- the norm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_of_change", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_expanded_norm_is_that_of_the_sum(size_of_change: float, dtype: torch.dtype) -> None:
    weight = (torch.randn(64, 96) / 10).to(dtype)
    a, b = torch.randn(8, 96) / 10, size_of_change * torch.randn(64, 8) / 8
    found = row_norms(weight, a, b, SCALE)
    assert found.dtype == torch.float32
    truth = (weight.double() + SCALE * b.double() @ a.double()).norm(dim=1)
    formed = (weight + (SCALE * b @ a).to(dtype)).to(dtype).norm(dim=1)  # as a model in this dtype would form it

    def worst(norms: Tensor) -> float:
        return float(((norms.double() - truth) / truth).abs().max())

    if dtype == torch.bfloat16:
        assert worst(found) < 0.25 * torch.finfo(dtype).eps  # less than half a rounding of the result
        assert worst(found) < worst(formed)
    else:
        assert worst(found) < 8 * torch.finfo(dtype).eps


def test_a_change_that_cancels_the_weight_leaves_a_number_that_divides() -> None:
    weight = torch.randn(3, 3)
    for dtype in (torch.float32, torch.bfloat16):
        norms = row_norms(weight.to(dtype), torch.eye(3), -weight.to(dtype).float() / SCALE, SCALE)
        assert norms.isfinite().all()
        assert (norms > 0).all()
        assert (1 / norms).isfinite().all()


def changed(weight: nn.Parameter, how: str, host: nn.Linear) -> None:
    """One way of giving W other values."""
    new = torch.randn(host.weight.shape).to(weight.dtype)
    with torch.no_grad():
        if how == "in place":
            weight.mul_(1.5)
        elif how == "a slice":
            weight[1:].add_(0.5)
        elif how == "data":
            weight.data.mul_(1.5)
        elif how == "load_state_dict":
            host.load_state_dict({**host.state_dict(), "weight": new})
        elif how == "assign":
            host.load_state_dict({**host.state_dict(), "weight": new}, assign=True)
        elif how == "to":
            host.to(torch.bfloat16)
        elif how == "to and back":
            host.to(torch.bfloat16)
            host.float()
        elif how == "replaced":
            host.weight = nn.Parameter(new, requires_grad=False)
        elif how == "data replaced":
            weight.data = new


WAYS = ["in place", "a slice", "data", "load_state_dict", "assign", "to", "to and back", "replaced", "data replaced"]


@pytest.mark.parametrize("how", WAYS)
def test_the_norm_follows_every_change_of_the_weight(how: str) -> None:
    host = nn.Linear(IN, OUT).requires_grad_(False)
    a, b = torch.randn(R, IN), torch.randn(OUT, R)
    for _ in range(2):
        row_norms(host.weight, a, b, SCALE)
        changed(host.weight, how, host)
        truth = (host.weight.double() + SCALE * b.double() @ a.double()).norm(dim=1)
        close(row_norms(host.weight, a, b, SCALE), truth, 8, host.weight.dtype)


def test_the_norm_of_an_unchanged_weight_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    host = nn.Linear(IN, OUT).requires_grad_(False)
    calls: list[int] = []
    read = kernel._row_squares
    model = inlay.attach(nn.Sequential(host), inlay.DoRA(r=R, targets="0"))
    monkeypatch.setattr(kernel, "_row_squares", lambda *t: calls.append(1) or read(*t))
    x = torch.randn(T, IN)
    for _ in range(3):
        model(x)
    assert calls == [1]
    stored = torch.randn(IN, OUT)  # as Conv1D holds it: every call transposes it anew
    first = row_norms(stored.t(), torch.zeros(R, IN), torch.zeros(OUT, R), SCALE)
    assert torch.equal(row_norms(stored.t(), torch.zeros(R, IN), torch.zeros(OUT, R), SCALE), first)
    assert calls == [1, 1]


def test_two_weights_in_one_memory_have_a_norm_each() -> None:
    whole = torch.randn(OUT, IN)
    zero = torch.zeros(R, IN)
    for rows in (slice(0, OUT), slice(0, 2), slice(2, OUT), slice(0, OUT)):
        found = row_norms(whole[rows], zero, whole.new_zeros(whole[rows].shape[0], R), SCALE)
        close(found, whole[rows].norm(dim=1), 4)


def test_norms_read_in_inference_mode_serve_training_too() -> None:
    host = nn.Linear(IN, OUT).requires_grad_(False)
    model = inlay.attach(nn.Sequential(host), inlay.DoRA(r=R, targets="0"))
    kernel._SQUARES.clear()
    x = torch.randn(T, IN, requires_grad=True)
    with torch.inference_mode():
        seen = model(x).clone()
    y = model(x)
    assert torch.equal(y, seen)
    y.sum().backward()


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropped", [False, True])
def test_it_keeps_x_h_and_y(dtype: torch.dtype, dropped: bool) -> None:
    tensors = operands(T, IN, dtype=dtype, needs=(True, False, True, True, True))
    drop = masked("packed" if dropped else "none", tensors[0])
    norms = row_norms(tensors[1], tensors[3].detach(), tensors[4].detach(), SCALE)
    with kept(*tensors[1:], norms) as found:
        y = fused(*tensors, drop, norms=norms)
    bits = math.ceil(T * IN / 8)
    assert [t.shape for t in found] == [(T, IN), (T, R), *([(bits,)] if dropped else []), (T, OUT)]
    assert found[0].data_ptr() == tensors[0].data_ptr()
    assert found[-1].data_ptr() == y.data_ptr()
    assert size(found) == T * (IN + R + OUT) * y.element_size() + (bits if dropped else 0)


@pytest.mark.parametrize("frozen", ["x", "a", "b", "magnitude"])
def test_what_a_frozen_part_does_not_need_is_not_kept(frozen: str) -> None:
    needs = tuple(name != frozen for name in ("x", "bias", "a", "b", "magnitude"))
    tensors = operands(needs=needs)
    norms = row_norms(tensors[1], tensors[3].detach(), tensors[4].detach(), SCALE)
    with kept(*tensors[1:], norms) as found:
        fused(*tensors, norms=norms)
    shapes = {"a": [(T, R), (T, OUT)], "b": [(T, IN), (T, OUT)], "magnitude": [(T, IN), (T, R)]}
    assert [t.shape for t in found] == shapes.get(frozen, [(T, IN), (T, R), (T, OUT)])


def test_nothing_is_kept_without_gradients() -> None:
    with kept() as found, torch.no_grad():
        fused(*operands())
    assert found == []
