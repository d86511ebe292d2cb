"""LoRA's autograd functions against the plain formula: values, both derivatives, and what they keep."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from oracles import plain_formulas as references
from oracles.plain_formulas import SCALE, close, gradients, kept, leaf, size, twin
from torch import Tensor

from inlay.kernels import dropout
from inlay.kernels.lora import AddLowRank, LowRankLinear

T, IN, OUT, R = 7, 5, 4, 3
MASKS = ("none", "packed", "bool")
BOTH = torch.autograd.gradcheck, torch.autograd.gradgradcheck


def fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    result: Tensor = LowRankLinear.apply(x, weight, bias, a, b, SCALE, x.dtype, mask, gate, None)
    return result


def added(y: Tensor, x: Tensor, a: Tensor, b: Tensor, mask: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    result: Tensor = AddLowRank.apply(y, x, a, b, SCALE, x.dtype, mask, gate)
    return result


def drawn(kind: str, shape: Any, p: float = 0.4) -> Tensor | None:
    """No mask, one as it is drawn on CPU, or one as it is drawn elsewhere."""
    if kind == "none":
        return None
    return dropout.draw(torch.Size(shape), p, torch.device("cpu")) if kind == "packed" else torch.rand(*shape) >= p


def operands(*shape: int, dtype: torch.dtype = torch.float32, needs: tuple[bool, ...] = (True,) * 5) -> list[Tensor]:
    """x, W, b, A, B."""
    sizes = [shape or (T, IN), (OUT, IN), (OUT,), (R, IN), (OUT, R)]
    return [leaf(*one, dtype=dtype, grad=need) for one, need in zip(sizes, needs, strict=True)]


# -- values and derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [False, True])
def test_both_derivatives_are_those_of_finite_differences(mask: str, bias: bool, gated: bool) -> None:
    x, weight, b0, a, b = operands(2, 3, IN, dtype=torch.float64)
    drop = drawn(mask, x.shape)
    gate = torch.tensor([[1.0, 0, 0.5], [0, 2, 1]]).double() if gated else None
    y = leaf(2, 3, OUT, dtype=torch.float64)
    for check in BOTH:
        assert check(lambda *t: fused(*t, drop, gate), (x, weight, b0 if bias else None, a, b))
        assert check(lambda *t: added(*t, drop, gate), (y, x, a, b))


def test_a_gate_on_h_is_one_on_each_rows_ranks() -> None:
    """A gate of ones and zeros gives each row of the batch the adapter that has those ranks alone."""
    x, weight, bias, a, b = operands(2, 4, IN, dtype=torch.float64)
    gate = torch.tensor([[1.0, 1, 0], [0, 0, 1]]).double()
    y = fused(x, weight, bias, a, b, None, gate)
    for row, ranks in enumerate(([0, 1], [2])):
        close(y[row], references.lora(x[row], weight, bias, a[ranks], b[:, ranks]), 8)
        close(added(x.new_zeros(2, 4, OUT), x, a, b, None, gate)[row], y[row] - x[row] @ weight.t() - bias, 8)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=5))[:-1])
@pytest.mark.parametrize("mask", ["none", "packed"])
def test_every_choice_of_what_is_trained_gives_the_same_gradients(needs: tuple[bool, ...], mask: str) -> None:
    tensors = operands(dtype=torch.float64, needs=needs)
    drop = drawn(mask, (T, IN))
    alone = [twin(t) for t in tensors]
    found = gradients(fused(*tensors, drop), *tensors)
    expected = gradients(references.lora(*alone, drop), *alone)
    for one, other in zip(found, expected, strict=True):
        close(one, other, 16)
    tensors[2] = leaf(T, OUT, dtype=torch.float64, grad=needs[2])  # in place of b: what something else made
    y, x, a, b = tensors[2], tensors[0], *tensors[3:]
    if any(t.requires_grad for t in (y, x, a, b)):
        alone = [twin(t) for t in (y, x, a, b)]
        plain = alone[0] + references.lora(alone[1], torch.zeros(OUT, IN).double(), None, *alone[2:], drop)
        for one, other in zip(gradients(added(y, x, a, b, drop), y, x, a, b), gradients(plain, *alone), strict=True):
            close(one, other, 16)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=5))[:-1])
def test_second_derivatives_wherever_they_need_nothing_that_is_not_kept(needs: tuple[bool, ...]) -> None:
    tensors = operands(dtype=torch.float64, needs=needs)
    _, need_weight, _, need_a, need_b = needs
    if need_b and not need_a and not need_weight:  # dB = s dyᵀ h, and h is a function of an x that was not kept
        y = fused(*tensors)
        with pytest.raises(RuntimeError, match="a second derivative through LoRA needs its input"):
            torch.autograd.grad(y.square().sum(), tensors[4], create_graph=True)
    else:
        assert torch.autograd.gradgradcheck(fused, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("masters", [True, False])
def test_it_equals_the_plain_formula_to_rounding(dtype: torch.dtype, mask: str, masters: bool) -> None:
    tensors = [leaf(3, 5, 4, 40), leaf(24, 40), leaf(24), leaf(R, 40), leaf(24, R)]
    kinds = [dtype] * 3 + [torch.float32 if masters else dtype] * 2
    tensors = [t.detach().to(kind).requires_grad_() for t, kind in zip(tensors, kinds, strict=True)]
    drop = drawn(mask, tensors[0].shape)
    alone = [twin(t) for t in tensors]
    y, truth = fused(*tensors, drop), references.lora(*alone, drop)
    assert y.dtype == dtype
    # Sums of up to 60 products, of operands each rounded once more than in the truth.
    close(y, truth, 8, dtype)
    for tensor, found, expected in zip(tensors, gradients(y, *tensors), gradients(truth, *alone), strict=True):
        assert found.dtype == tensor.dtype
        close(found, expected, 8, dtype)


@pytest.mark.parametrize("wrong", ["scale", "a", "b", "one bit of the mask"])
def test_an_error_of_a_thousandth_is_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above has teeth: a reference that is wrong by so little does not pass for the formula."""
    tensors = operands(20, IN)
    drop = drawn("packed", (20, IN))
    alone = [twin(t) for t in tensors]
    y = fused(*tensors, drop)
    close(y, references.lora(*alone, drop), 8)
    if wrong == "scale":
        monkeypatch.setattr(references, "SCALE", SCALE * 1.001)
    elif wrong in "ab":
        alone["xwcab".index(wrong)].data *= 1.001
    else:
        drop = drop.clone()
        drop[3] ^= 4
    with pytest.raises(AssertionError, match="is more than"):
        close(y, references.lora(*alone, drop), 8)


def test_non_contiguous_gradients_come_in_too() -> None:
    tensors = operands(2, 3, IN, dtype=torch.float64)
    alone = [twin(t) for t in tensors]
    for out in (lambda y: y.sum(), lambda y: y.transpose(0, 1).square().sum(), lambda y: y[:, ::2, 1:].sum()):
        found = torch.autograd.grad(out(fused(*tensors)), tensors)
        for one, other in zip(found, torch.autograd.grad(out(references.lora(*alone)), alone), strict=True):
            close(one, other, 16)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_of_many_outputs_at_once(mask: str) -> None:
    """`is_grads_batched` maps the backward over a batch of dy, as torch.autograd.functional.jacobian does."""
    tensors = operands(dtype=torch.float64)
    drop = drawn(mask, (T, IN))
    y = fused(*tensors, drop)
    dys = torch.randn(6, *y.shape, dtype=torch.float64)
    together = torch.autograd.grad(y, tensors, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for one, other in zip(together, torch.autograd.grad(y, tensors, dy, retain_graph=True), strict=True):
            close(one[i], other, 16)


def test_a_gradient_can_be_taken_twice_and_leaves_what_came_in_alone() -> None:
    tensors = operands(dtype=torch.float32)
    drop = drawn("packed", (T, IN))
    before = [t.detach().clone() for t in tensors]
    y = fused(*tensors, drop)
    dy = torch.randn_like(y)
    copy = dy.clone()
    once = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    twice = torch.autograd.grad(y, tensors, dy)
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))
    assert torch.equal(dy, copy)
    assert all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_it_keeps_x_and_h_and_one_bit_for_each_entry_of_a_mask(dtype: torch.dtype, masked: bool) -> None:
    x, weight, bias, a, b = operands(T, IN, dtype=dtype, needs=(True, False, False, True, True))
    drop = drawn("packed" if masked else "none", (T, IN))
    with kept(weight, bias, a, b) as found:
        fused(x, weight, bias, a, b, drop)
    assert found[0].data_ptr() == x.data_ptr()
    assert [t.shape for t in found[1:]] == [(T, R), *([(math.ceil(T * IN / 8),)] if masked else [])]
    assert size(found) == (T * IN + T * R) * x.element_size() + (math.ceil(T * IN / 8) if masked else 0)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("frozen", ["a", "b", "both"])
def test_what_a_frozen_factor_does_not_need_is_not_kept(frozen: str, add: bool) -> None:
    needs = (True, False, False, frozen == "b", frozen == "a")
    x, weight, bias, a, b = operands(dtype=torch.float32, needs=needs)
    y = leaf(T, OUT)
    with kept(weight, bias, a, b) as found:
        added(y, x, a, b) if add else fused(x, weight, bias, a, b)
    shapes = {"a": [(T, R)], "b": [(T, IN)], "both": []}[frozen]
    assert [t.shape for t in found] == shapes


def test_siblings_keep_one_x() -> None:
    x = leaf(T, IN)
    with kept() as found:
        operands_apart = [operands(needs=(True, False, False, True, True))[1:] for _ in range(3)]
        for weight, bias, a, b in operands_apart:
            fused(x, weight, bias, a, b)
    parameters = {t.data_ptr() for one in operands_apart for t in one}
    mine = [t for t in found if t.data_ptr() not in parameters]
    assert [t.shape for t in mine] == [(T, IN), (T, R), (T, R), (T, R)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_without_gradients(dtype: torch.dtype) -> None:
    tensors = operands(dtype=dtype)
    drop = drawn("packed", (T, IN))
    with kept() as found, torch.no_grad():
        fused(*tensors, drop)
    with kept() as frozen:
        fused(*[t.detach() for t in tensors], drop)
    assert found == frozen == []
