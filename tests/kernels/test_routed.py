"""The routed low-rank linear: against its definition, expert by expert, and its own gradients against autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay.kernels.routed import RoutedLinear, mixed, routed, shares

WIDE = {"dtype": torch.float64}


def parts() -> tuple[Tensor, ...]:
    """x (2, 4, 5), W, b, A, three B of rank 2 and R; the last three, and x, with gradients."""
    x, a = torch.randn(2, 4, 5, **WIDE), torch.randn(2, 5, **WIDE)
    experts, router = torch.randn(3 * 2, 6, **WIDE), torch.randn(3, 2, **WIDE)
    trained = [tensor.requires_grad_() for tensor in (x, a, experts, router)]
    return (trained[0], torch.randn(6, 5, **WIDE), torch.randn(6, **WIDE), *trained[1:])


def test_it_is_the_mixture_of_the_experts_outputs() -> None:
    x, w, b, a, experts, router = parts()
    h = x @ a.T
    each = (h @ router.T).softmax(-1).flatten(0, 1).mean(0)
    expected = x @ w.T + b + 0.7 * sum(p * (h @ one) for p, one in zip(each, experts.chunk(3), strict=True))
    found = RoutedLinear.apply(x, w, b, a, experts, router, 0.7, torch.float64, None)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("frozen", [(), (0,), (3, 4), (5,)])
def test_gradients(frozen: tuple[int, ...]) -> None:
    given = [t.detach().requires_grad_(t.requires_grad and i not in frozen) for i, t in enumerate(parts())]
    assert torch.autograd.gradcheck(lambda *t: RoutedLinear.apply(*t, 0.7, torch.float64, None), given)


def test_no_rows_are_left_to_the_base() -> None:
    linear = nn.Linear(5, 6)

    def inner(x: Tensor) -> Any:
        return linear(x)

    _, _, _, a, experts, router = (t.float() for t in parts())
    assert routed(inner, torch.empty(0, 5), a, experts, router, 1.0).shape == (0, 6)


def test_shares_are_at_least_single_precision_and_sum_to_one() -> None:
    p = shares(torch.randn(1000, 2).bfloat16(), torch.randn(3, 2))
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.mean(0).sum(), torch.tensor(1.0))
    assert mixed(p.mean(0), torch.randn(6, 4)).shape == (2, 4)
