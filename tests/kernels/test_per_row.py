"""A low-rank change for each row: against one linear after the other, and its gradients against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inlay.kernels.per_row import RowLinear

WIDE = {"dtype": torch.float64}


def parts(*middle: int) -> list[Tensor]:
    """x (3, …, 5), W, b, A (3, 5, 2) and B (3, 2, 6)."""
    shapes = [(3, *middle, 5), (6, 5), (6,), (3, 5, 2), (3, 2, 6)]
    return [torch.randn(*shape, **WIDE).requires_grad_(i in (0, 3, 4)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("middle", [(), (4,), (2, 4)])
def test_each_row_has_its_own_change(middle: tuple[int, ...]) -> None:
    x, w, bias, a, b = parts(*middle)
    found = RowLinear.apply(x, w, bias, a, b, torch.float64, None)
    expected = torch.stack([x[i] @ (w.T + a[i] @ b[i]) + bias for i in range(3)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("frozen", [(), (0,), (3,), (0, 3), (4,)])
def test_gradients(frozen: tuple[int, ...]) -> None:
    given = [t.detach().requires_grad_(t.requires_grad and i not in frozen) for i, t in enumerate(parts(4))]
    assert torch.autograd.gradcheck(lambda *t: RowLinear.apply(*t, torch.float64, None), given)
