"""A shadow's correction and move against their formulas, by plain autograd of the same graph, in several dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels.shadow import Layers, corrected, moved

B, T, D, R, W = 2, 5, 6, 3, 4


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def network() -> Layers:
    return Layers(leaf(W, D), leaf(W), leaf(D, W), leaf(D))


def mlp(x: Tensor, layers: Layers) -> Tensor:
    return F.linear(F.gelu(F.linear(x, layers.w1, layers.b1)), layers.w2, layers.b2)


def test_the_correction_and_its_gradients() -> None:
    torch.manual_seed(0)
    h, s, down, up = tensors = leaf(B, T, D), leaf(B, T, D), leaf(R, D), leaf(D, R)
    found, expected = corrected(h, s, down, up, 0.3), h + 0.3 * (h - s) @ down.T @ up.T
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_the_move_and_its_gradients() -> None:
    torch.manual_seed(0)
    s, x, candidate, gate = leaf(B, T, D), leaf(B, T, D), network(), network()
    g = torch.sigmoid(mlp(x, gate))
    found, expected = moved(s, x, candidate, gate), (1 - g) * s + g * mlp(x, candidate)
    torch.testing.assert_close(found, expected)
    weights, tensors = torch.randn_like(found), (s, x, *candidate, *gate)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_nothing_is_corrected_at_the_start() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        h = torch.randn(B, T, D).to(dtype)
        assert torch.equal(corrected(h, torch.randn(B, T, D), leaf(R, D), torch.zeros(D, R), 0.3, rate=0.5), h)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """fp32 parameters, and activations of the base's dtype: each result has the dtype of what it changes."""
    torch.manual_seed(0)
    h, s, down, up = leaf(B, T, D), leaf(B, T, D), leaf(R, D), leaf(D, R)
    candidate, gate = network(), network()
    low, state = h.to(dtype), s.to(dtype)
    first, second = corrected(low, state, down.float(), up.float(), 0.3), moved(state, low, candidate, gate)
    assert (first.dtype, second.dtype) == (dtype, dtype)
    error = 20 * torch.finfo(dtype).eps  # some dozens of roundings of entries of order one
    torch.testing.assert_close(first.double(), corrected(h, s, down, up, 0.3), rtol=error, atol=error)
    torch.testing.assert_close(second.double(), moved(s, h, candidate, gate), rtol=error, atol=error)


def test_dropout_is_of_the_difference() -> None:
    torch.manual_seed(0)
    h, s = torch.randn(4000, 2), torch.randn(4000, 2)
    eye = torch.eye(2)
    change = corrected(h, s, eye, eye, 1.0, rate=0.25) - h
    kept = change.abs() > 1e-6
    assert 0.72 < kept.float().mean() < 0.78  # 8,000 draws: a standard deviation of 0.005
    torch.testing.assert_close(change[kept], ((h - s) / 0.75)[kept], rtol=1e-4, atol=1e-4)
