"""The compressed backward: exact but for dA, which is that of x̂ by plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inlay
from inlay.kernels.compressed import adapted, grouped, mean_direction


@pytest.mark.parametrize(("size", "groups"), [(12, 3), (13, 4), (5, 8), (6, 6)])
def test_gradients_are_those_of_the_formula(size: int, groups: int) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True) for n in (size, 4))
    a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, size), (4, 2)))
    e = mean_direction(x, groups).double()
    torch.testing.assert_close(e.norm(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0.0)  # formed in fp32
    weights = torch.randn(2, 3, 4, dtype=torch.float64)
    out = adapted(y, x, a, b, 1.5, e, groups, 0.7)
    torch.testing.assert_close(out, y + 1.5 * (x @ a.T @ b.T))
    found = torch.autograd.grad((out * weights).sum(), (y, x, a, b))
    expected = torch.autograd.grad(((y + 1.5 * (x @ a.T @ b.T)) * weights).sum(), (y, x, a, b))
    parts = grouped(x.detach(), groups)
    stand_in = (0.7 * (parts @ e)[..., None] * e).flatten(1)[:, :size].view(2, 3, size)
    (of_a,) = torch.autograd.grad(((stand_in @ a.T @ b.T) * 1.5 * weights).sum(), a)
    for one, other in zip(found, (*expected[:2], of_a, expected[3]), strict=True):
        torch.testing.assert_close(one, other)


def test_a_feature_a_group_is_exact_and_a_zero_mean_has_a_direction() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    e = mean_direction(x, 4)
    torch.testing.assert_close((grouped(x, 4) @ e)[..., None] * e, grouped(x, 4))
    torch.testing.assert_close(mean_direction(torch.zeros(5, 8), 2), torch.full((4,), 0.5))


def test_a_batch_without_a_row_decides_on_no_direction() -> None:
    """As an expert of a mixture has it that no token was sent to."""
    linear = inlay.attach(
        nn.Sequential(nn.Linear(8, 4)), inlay.VeLoRA(r=2, num_groups=2, projection="batch_average_once", targets="0")
    )
    e = dict(linear.named_buffers())["0.inlays.default.velora.lora_velora_embed"]
    linear(torch.zeros(0, 8)).sum().backward()
    assert not e.any()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    linear(x).sum().backward()
    torch.testing.assert_close(e, mean_direction(x, 2))
