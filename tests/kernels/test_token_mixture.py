"""Several thin products side by side, weighed token by token, against the sum of one after another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from inlay.kernels.token_mixture import token_mixture


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 4, 3), (3,)])
def test_value_and_gradients(ranks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    double = {"dtype": torch.float64, "requires_grad": True}
    x, w = torch.randn(2, 5, 7, **double), torch.randn(2, 5, len(ranks), **double)  # type: ignore[arg-type]
    found = [
        (torch.randn(r, 7, **double), torch.randn(6, r, **double), 0.5 + r)  # type: ignore[arg-type]
        for r in ranks
    ]
    expected = sum(w[..., n, None] * s * (x @ a.T @ b.T) for n, (a, b, s) in enumerate(found))
    mixed = token_mixture(x, w, found, [0.0] * len(ranks))
    torch.testing.assert_close(mixed, expected)
    every = [x, w, *(tensor for a, b, _ in found for tensor in (a, b))]
    direction = torch.randn_like(mixed)
    for mine, other in zip(
        torch.autograd.grad((mixed * direction).sum(), every),
        torch.autograd.grad((expected * direction).sum(), every),  # type: ignore[union-attr]
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_each_adapter_has_its_own_dropout() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 4), torch.ones(3, 2)
    found = [(torch.randn(2, 4), torch.randn(5, 2), 1.0) for _ in range(2)]
    torch.manual_seed(1)
    mixed = token_mixture(x, w, found, [0.5, 0.0])
    torch.manual_seed(1)
    (a, b, _), (c, d, _) = found
    torch.testing.assert_close(mixed, F.dropout(x, 0.5) @ a.T @ b.T + x @ c.T @ d.T)
