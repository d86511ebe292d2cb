"""The density loss against its formula in plain autograd, in the limit, and in what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inlay.kernels import density


def plain(x: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    square = x.double().square()
    soft = square / (square + eps)
    return soft.mean() if mask is None else soft[mask].mean()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("eps", [1e-7, 1e-2, 20.0])
def test_value_and_gradient_are_the_formulas(eps: float, masked: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7).relu().requires_grad_()
    mask = torch.rand(3, 5) < 0.6 if masked else None
    expected = plain(x, mask, eps)
    (by_autograd,) = torch.autograd.grad(expected, x)
    found = density.penalty(x, mask, eps)
    (gradient,) = torch.autograd.grad(found, x)
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-4, atol=1e-9)  # squares of sums in fp32
    if mask is not None:
        assert not gradient[~mask].any()


def test_the_limit_is_the_share_of_entries_that_are_not_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 30).relu()
    nonzero, large, total = density.counts(x, None, 0.5).tolist()
    assert (nonzero, large, total) == (int((x != 0).sum()), int((x >= 0.5).sum()), 1200)
    values = [float(density.penalty(x, None, eps)) for eps in (20.0, 1e-1, 1e-7, 1e-14)]
    assert values == sorted(values)
    assert 0 <= values[0] < values[-1] < 1
    assert values[-1] == pytest.approx(nonzero / total, abs=1e-6)


def test_squared_relu_has_the_zeros_of_relu_and_no_gradient_there() -> None:
    z = torch.tensor([-2.0, -0.0, 0.0, 1e-3, 0.5]).requires_grad_()
    a = z.relu().square()
    assert density.counts(a, None, 1e-3).tolist() == [2, 1, 5]
    (gradient,) = torch.autograd.grad(density.penalty(a[None], None, 1e-7), z)
    assert gradient[:3].tolist() == [0, 0, 0]
    expected = 2 * a.detach() * 1e-7 / (a.detach() ** 2 + 1e-7) ** 2 * 2 * z.detach() / 5
    torch.testing.assert_close(gradient[3:], expected[3:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(20, 8) * 1e-3).to(dtype).requires_grad_()
    found = density.penalty(x, None, 1e-7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(x, None, 1e-7).float())
    (gradient,) = torch.autograd.grad(found, x)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


def test_nothing_is_kept_but_the_activation() -> None:
    x, mask = torch.randn(4, 6, requires_grad=True), torch.ones(4, dtype=torch.bool)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        density.penalty(x, mask, 1e-7)
    assert sum(t.numel() for t in kept if t.is_floating_point()) == x.numel()


def test_no_position_counts() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    found = density.penalty(x, torch.zeros(2, dtype=torch.bool), 1e-7)
    assert found == 0
    (gradient,) = torch.autograd.grad(found, x)
    assert not gradient.any()
