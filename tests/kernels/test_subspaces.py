"""The kernels of the methods that work within subspaces of W: against their plain formulas in autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import inlay
from inlay.engine.adapters import adapters_of
from inlay.kernels import clusters, subspaces, suppression


def gradients(function: object, *tensors: Tensor) -> list[Tensor]:
    value = function(*tensors)  # type: ignore[operator]
    weights = torch.linspace(-1, 1.3, value.numel(), dtype=value.dtype).view(value.shape)
    return [value, *torch.autograd.grad((value * weights).sum(), tensors)]


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_what_is_taken_from_r(scale: float) -> None:
    torch.manual_seed(0)
    r, k, weight = torch.randn(3, 7).requires_grad_(), torch.randn(5, 3).requires_grad_(), torch.randn(5, 7)
    found = gradients(lambda r, k: suppression.instead(r, k, weight, scale), r, k)
    expected = gradients(lambda r, k: scale * r - k.T @ weight, r, k)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)
    start = suppression.taken(k, weight).detach().requires_grad_()
    assert not suppression.instead(start, k, weight, 1.0).any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "width"), [(8, 8), (8, 5), (5, 8)])
def test_trained_triplets_are_the_weights_and_keep_from_the_frozen_ones(out: int, width: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(width, out, bias=bias)).double()
    base = layer[0].weight.detach().clone()
    inlay.attach(layer, inlay.OSF(effective_rank=2, targets="0"))
    ((_, piece),) = adapters_of(layer).get("default").pieces()
    x = torch.randn(2, 6, width, dtype=torch.float64).requires_grad_()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, base, layer[0].bias))
    with torch.no_grad():
        for parameter in piece.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    names = list(piece.now())
    found = gradients(lambda x, *_: layer(x), x, *names)
    u, s, v = torch.linalg.svd(base, full_matrices=False)

    def plain(x: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
        weight = (u[:, :2] * s[:2]) @ v[:2] + (left * values) @ right
        return torch.nn.functional.linear(x, weight, layer[0].bias)

    y, dx, du, ds, dv = gradients(plain, x, *names)
    expected = [y, dx, du - u[:, :2] @ (u[:, :2].T @ du), ds, dv - (dv @ v[:2].T) @ v[:2]]
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)  # the factors of W come from fp32
    a, b = subspaces.thin(piece.now(), piece.frozen())
    torch.testing.assert_close(b @ a, piece.delta())


def test_starts_span_what_their_rows_lie_in() -> None:
    torch.manual_seed(0)
    left = torch.randn(9, 4)
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 0])
    for k, start in enumerate(clusters.starts(left, rows, 2, 0.0)):
        own = left[rows == k]
        rank = min(2, len(own))
        torch.testing.assert_close(start @ start.T, torch.eye(rank))
        best = torch.linalg.svdvals(own)[:rank].square().sum()  # as near as a space of that rank can come
        torch.testing.assert_close((own @ start.T).square().sum(), best)
    near_one = torch.tensor([[1.0, 0], [1, 1e-3], [1, -1e-3]])
    assert [len(start) for start in clusters.starts(near_one, torch.zeros(3).long(), 2, 0.1)] == [1]


def test_clusters_and_vectors_are_the_same_each_time_and_leave_the_random_state() -> None:
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    u, v = clusters.singular_vectors(matrix, 5, 3)
    again, _ = clusters.singular_vectors(matrix, 5, 3)
    assert torch.equal(u, again)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(v @ v.T, torch.eye(5), rtol=0, atol=1e-5)
    assert torch.equal(clusters.of_rows(u, 3), clusters.of_rows(u, 3))
    assert clusters.of_rows(u, 30).unique().numel() == 20
