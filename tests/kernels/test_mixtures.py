"""Mixtures of a bank's vectors: against their definition, and to the weights of a file and back."""

from __future__ import annotations

import pytest
import torch

from inlay.kernels.mixtures import mixed, to_logits, to_weights


@pytest.mark.parametrize(("k", "h"), [(1, 1), (1, 6), (2, 6), (6, 6)])
def test_value_and_gradients(k: int, h: int) -> None:
    logits = torch.randn(5, h, dtype=torch.float64, requires_grad=True)
    bank = torch.randn(h, 4, dtype=torch.float64, requires_grad=True)
    for row, found in zip(logits, mixed(logits, bank, k), strict=True):
        chosen = row.argsort(descending=True)[:k]
        shares = row[chosen].exp() / row[chosen].exp().sum()
        torch.testing.assert_close(found, sum(share * bank[j] for share, j in zip(shares, chosen, strict=True)))
    assert torch.autograd.gradcheck(lambda x, y: mixed(x, y, k), (logits, bank))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_weights_and_back(k: int) -> None:
    logits, bank = torch.randn(3, 2, 9), torch.randn(9, 4)
    which, weights = to_weights(logits, k)
    assert (which.shape, weights.shape) == ((3, 2, k), (3, 2, k - 1))
    back = to_logits(which, weights, 9)
    assert (back.isinf().sum(-1) == 9 - k).all()
    torch.testing.assert_close(mixed(back.view(6, 9), bank, k), mixed(logits.view(6, 9), bank, k))


@pytest.mark.parametrize(
    ("h", "kind"), [(255, torch.uint8), (256, torch.int16), (2**15 - 1, torch.int16), (2**15, torch.int32)]
)
def test_the_smallest_type_that_counts_so_far(h: int, kind: torch.dtype) -> None:
    assert to_weights(torch.randn(1, h), 2)[0].dtype == kind


def test_one_weight_that_takes_it_all() -> None:
    which, weights = to_weights(torch.tensor([[200.0, 0.0, -5.0]]), 2)
    back = to_logits(which, weights, 3)
    torch.testing.assert_close(mixed(back, torch.eye(3), 2), torch.tensor([[1.0, 0.0, 0.0]]))
