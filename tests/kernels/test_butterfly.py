"""BOFT's butterfly: the product of its factors, whichever way it is computed."""

from __future__ import annotations

import pytest
import torch
from oracles.plain_formulas import close, gradients, twin
from torch import Tensor

from inlay.kernels import butterfly
from inlay.kernels.butterfly import stretched, turned


def product(r: Tensor, size: int) -> Tensor:
    """B_{m−1} … B_0, entry by entry, by the places that each block turns."""
    m, _, b, _ = r.shape
    whole = torch.eye(size, dtype=r.dtype)
    for j in range(m):
        factor = torch.zeros(size, size, dtype=r.dtype)
        half, apart = (b // 2, 2**j * (b // 2)) if m > 1 else (b, 0)
        firsts = [at for at in range(0, size, half) if not (apart and at // apart % 2)]
        for block, at in enumerate(firsts):
            places = torch.cat([torch.arange(at, at + half)] + [torch.arange(at + apart, at + apart + half)] * (m > 1))
            q = (r[j, block] - r[j, block].T) / 2
            identity = torch.eye(b, dtype=r.dtype)
            turn = (identity - q) @ torch.linalg.inv(identity + q)
            factor = factor.index_put((places[:, None], places), turn)
        whole = factor @ whole
    return whole


@pytest.mark.parametrize("widest", [0, 64])
@pytest.mark.parametrize(("m", "b"), [(1, 3), (1, 4), (2, 4), (3, 4), (4, 2), (2, 12), (2, 24)])
def test_it_is_the_product_of_the_factors(m: int, b: int, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(butterfly, "WIDEST", widest)
    x, r = torch.randn(2, 5, 48, requires_grad=True), torch.randn(m, 48 // b, b, b, requires_grad=True)
    exact = [twin(x), twin(r)]
    y, truth = turned(x, r), exact[0] @ product(exact[1], 48)
    close(y, truth, 32)
    for found, expected in zip(gradients(y, x, r), gradients(truth, *exact), strict=True):
        close(found, expected, 64)
    close(turned(y, r, inverse=True), x, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widest", [0, 64])
def test_no_turn_gives_the_very_bits(widest: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(butterfly, "WIDEST", widest)
    x, y = torch.randn(2, 7, 32).to(dtype)
    for m in (1, 3):
        assert torch.equal(turned(x, torch.zeros(m, 8, 4, 4)), x)
    assert torch.equal(stretched(y, torch.randn(32).to(dtype), torch.ones(32)), y)
    assert torch.equal(stretched(y, None, torch.ones(32)), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_the_scale_leaves_the_bias_alone(biased: bool, dtype: torch.dtype) -> None:
    y, scale = torch.randn(50, 32).to(dtype), (1 + 0.1 * torch.randn(32)).requires_grad_()
    bias = torch.randn(32).to(dtype) if biased else None
    found, b = stretched(y, bias, scale), 0 if bias is None else bias.double()
    truth = (y.double() - b) * scale.double() + b
    assert found.dtype == dtype
    close(found, truth, 4)
    close(*gradients(found, scale), *gradients(truth, scale), 4, dtype)
