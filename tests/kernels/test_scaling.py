"""The vector of (IA)³ times activations: x ⊙ l rounded once, whatever the dtypes, with its gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles.plain_formulas import attached, close, gradients, kept, leaf, plainly, size, step, twin
from torch import Tensor

from inlay.kernels.scaling import Scale, scaled

BOTH = torch.autograd.gradcheck, torch.autograd.gradgradcheck
T, N = 64, 32
STEP = 2**-8
"""Half a step of bf16 relative to the smallest number of its power of two: the most that one rounding loses."""


def vector(centre: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (centre + 0.1 * torch.randn(N, dtype=dtype)).requires_grad_()


def by_entry(found: Tensor, truth: Tensor, roundings: float) -> None:
    """Each entry within so many roundings to bf16 of its own size."""
    assert found.dtype == torch.bfloat16
    error = (found.detach().double() - truth.detach().double()).abs()
    assert (error <= roundings * STEP * truth.detach().abs()).all()


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2))[:-1])
def test_both_derivatives_are_those_of_finite_differences(needs: tuple[bool, bool]) -> None:
    x = leaf(2, 3, 5, dtype=torch.float64, grad=needs[0])
    l = torch.randn(5, dtype=torch.float64).requires_grad_(needs[1])  # noqa: E741
    for check in BOTH:
        assert check(Scale.apply, (x, l))


@pytest.mark.parametrize("centre", [1.0, 0.7, 2.0, -1.0, 10.0, 0.0])
def test_it_is_the_fp32_product_to_the_rounding_of_each_entry(centre: float) -> None:
    x, l = torch.randn(T, N).bfloat16().requires_grad_(), vector(centre)  # noqa: E741
    exact_x, exact_l = twin(x), twin(l)
    y, truth = scaled(x, l), exact_x * exact_l
    by_entry(y, truth, 2)  # of l - 1 and of the sum
    (dx, dl), (true_dx, true_dl) = gradients(y, x, l), gradients(truth, exact_x, exact_l)
    assert dl.dtype == torch.float32
    by_entry(dx, true_dx, 3)  # and of dy, which comes in bf16
    close(dl, true_dl, 2, torch.bfloat16)


def test_a_change_of_a_thousandth_is_not_lost() -> None:
    """1.048 and 1.049 are one number in bf16; in their products a fifth of the entries is another."""
    x = torch.rand(400_000, 1).add(1).bfloat16()
    before, after = torch.tensor([1.048]), torch.tensor([1.049])
    assert torch.equal(x * before.bfloat16(), x * after.bfloat16())
    change = scaled(x, after).double() - scaled(x, before).double()
    # The shift 0.048 itself is held in steps of 0.00024: a change of 0.001 is four or five of them, less rounding.
    assert float(change.sum() / x.double().sum()) == pytest.approx(0.001, rel=0.25)


def test_near_one_it_is_rounded_as_if_formed_in_fp32() -> None:
    x, l = torch.randn(T, N).bfloat16(), (1 + 0.01 * torch.randn(N))  # noqa: E741
    truth = (x.float() * l).bfloat16()
    assert (scaled(x, l) == truth).float().mean() > 0.95
    assert (x * l.bfloat16() == truth).float().mean() < 0.8


def test_an_error_of_a_thousandth_is_seen() -> None:
    x, l = torch.randn(T, N, dtype=torch.float64), vector()  # noqa: E741
    close(scaled(x, l), x * l, 4, torch.float32)
    with pytest.raises(AssertionError, match="is more than"):
        close(scaled(x, l), x * l * 1.001, 4, torch.float32)


@pytest.mark.parametrize("shape", [(N,), (0, N), (2, 3, N), (2, 1, 3, N)])
def test_any_shape_of_x(shape: tuple[int, ...]) -> None:
    x, l = torch.randn(*shape).bfloat16().requires_grad_(), vector()  # noqa: E741
    y = scaled(x, l)
    assert y.shape == x.shape
    for found, truth in zip(gradients(y, x, l), gradients(x.float() * l, x, l), strict=True):
        close(found, truth, 2, torch.bfloat16)


def test_a_strided_x_and_a_strided_gradient() -> None:
    wide, l = torch.randn(N, 2 * T).bfloat16().requires_grad_(), vector()  # noqa: E741
    for x in (wide.t(), wide.t()[::2], wide.t()[:1].expand(5, N)):
        found = torch.autograd.grad(scaled(x, l).t().sum(), (wide, l))
        truth = torch.autograd.grad((x.float() * l).t().sum(), (wide, l))
        for one, other in zip(found, truth, strict=True):
            close(one, other, 4, torch.bfloat16)


def test_x_is_kept_only_while_l_is_trained() -> None:
    x, l = torch.randn(T, N).bfloat16().requires_grad_(), vector()  # noqa: E741
    with kept(l) as found:
        scaled(x, l)
    assert [t.data_ptr() for t in found] == [x.data_ptr()]
    with kept(l) as found:
        scaled(x, l.detach())
    assert size(found) <= l.numel() * 4
    with kept() as found, torch.no_grad():
        scaled(x, l)
    assert found == []


def test_one_dtype_takes_torchs_own_product() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, l = torch.randn(T, N, dtype=dtype), vector(dtype=dtype)  # noqa: E741
        assert torch.equal(scaled(x, l), x * l)


# -- in a model --------------------------------------------------------------------------------------------------------


def test_in_a_bf16_model_it_is_the_plain_formula_and_masters_keep_their_dtype() -> None:
    model = attached("ia3").bfloat16()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    x = torch.randn(9, 6).bfloat16().requires_grad_()
    y, found = step(model, x)
    with plainly():
        expected, truth = step(model, x)
    close(y, expected, 8)
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == other.dtype
        close(one, other, 8, torch.bfloat16)


def test_autocast_inside_and_a_backward_in_or_outside_of_it() -> None:
    model, x = attached("ia3"), torch.randn(9, 6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, inside = step(model, x)
        again = model(x)
    assert y.dtype == torch.bfloat16
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(inside, gradients(again, *parameters, x), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    for one, other in zip(inside, step(model, x)[1], strict=True):
        close(one, other, 16, torch.bfloat16)


def test_before_training_a_bf16_model_is_the_base_bit_for_bit() -> None:
    x = torch.randn(9, N).bfloat16()
    assert torch.equal(scaled(x, torch.ones(N)), x)
