"""The low-rank product against brute force: what runs beside the host equals the host with W + B·A in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inlay.kernels import low_rank

# Sums of at most a hundred products of order 1, in two orders: float32 rounding.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_linear_is_b_of_a_and_keeps_the_inputs_dtype() -> None:
    x, a, b, bias = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(6, 4), torch.randn(6)
    torch.testing.assert_close(low_rank.linear(x, a, b, bias), x @ (b @ a).T + bias, **CLOSE)
    assert torch.equal(low_rank.delta(a, b, torch.Size((6, 5))), b @ a)
    assert low_rank.linear(x.bfloat16(), a, b).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [None, 3.0, torch.tensor(3.0)])
def test_embedding_adds_to_the_rows_that_ids_pick(scale: Any) -> None:
    table = nn.Embedding(7, 4, padding_idx=2)
    if scale is not None:
        table.embed_scale = scale
    a, b = torch.randn(3, 7, requires_grad=True), torch.randn(4, 3)
    ids = torch.tensor([[0, 2, 6], [2, 5, 5]])
    rows = low_rank.embedding(ids, a, b, table)
    torch.testing.assert_close(rows, (b @ a).T[ids] * (1.0 if scale is None else 3.0), **CLOSE)
    rows.sum().backward()
    assert a.grad is not None
    assert (a.grad[:, 2] == 0).all()  # as in nn.Embedding, the padding row is not trained
    assert (a.grad[:, 5] != 0).all()


CONVOLUTIONS: list[tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = [
    (nn.Conv1d, (9,), {"kernel_size": 3, "stride": 2, "padding": 1}),
    (nn.Conv1d, (9,), {"kernel_size": 4, "padding": "same"}),
    (nn.Conv1d, (9,), {"kernel_size": 3, "groups": 2}),
    (nn.Conv2d, (6, 7), {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (2, 1)}),
    (nn.Conv2d, (6, 7), {"kernel_size": 3, "padding": 1, "groups": 4}),
    (nn.Conv2d, (6, 7), {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"}),
    (nn.Conv2d, (6, 7), {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "groups": 2}),
    (nn.Conv2d, (6, 7), {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"}),
    (nn.Conv3d, (4, 5, 4), {"kernel_size": 2, "padding": 1, "groups": 2}),
]


@pytest.mark.parametrize(("cls", "size", "fields"), CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_convolution_is_the_host_with_the_changed_kernel(
    cls: Any, size: tuple[int, ...], fields: dict[str, Any]
) -> None:
    host = cls(4, 8, bias=False, **fields)
    groups, r = host.groups, 4
    a = torch.randn(r, *host.weight.shape[1:])
    b = torch.randn(8, r // groups, *[1] * len(size))
    x = torch.randn(2, 4, *size)
    change = low_rank.convolution(x, a, b, host)
    delta = low_rank.delta(a, b, host.weight.shape)
    assert delta.shape == host.weight.shape
    with torch.no_grad():
        base = host(x)
        host.weight += delta
        torch.testing.assert_close(base + change, host(x), **CLOSE)
        torch.testing.assert_close(low_rank.convolution(x[0], a, b, host), change[0], **CLOSE)  # without a batch


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_kernel_spreads_over_all_channels_and_back(groups: int) -> None:
    host = nn.Conv2d(8, 8, 3, groups=groups)
    a, b = torch.randn(4, 8 // groups, 3, 3), torch.randn(8, 4 // groups, 1, 1)
    full = low_rank.spread_groups(a, groups)
    assert full.shape == (4, 8, 3, 3)
    assert int((full != 0).sum()) == a.numel()
    gathered = low_rank.gather_groups(full, groups)
    assert gathered is not None
    assert torch.equal(gathered, a)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(low_rank.convolution(x, full, b, host), low_rank.convolution(x, a, b, host), **CLOSE)
    assert low_rank.gather_groups(torch.randn(4, 8, 3, 3), groups) is None


@pytest.mark.parametrize("input_last", [True, False])
def test_experts_each_have_their_own_factors(input_last: bool) -> None:
    """Expert e has rows e·r … e·r + r − 1 of A, and columns e, e + E, e + 2E … of B."""
    experts, r, wide, out = 3, 2, 5, 4
    a, b = torch.randn(r * experts, wide), torch.randn(out, r * experts)
    shape = torch.Size((experts, out, wide) if input_last else (experts, wide, out))
    delta = low_rank.delta(a, b, shape, input_last=input_last)
    assert delta.shape == shape
    for expert in range(experts):
        own = b[:, expert::experts] @ a[expert * r : (expert + 1) * r]
        torch.testing.assert_close(delta[expert], own if input_last else own.T, **CLOSE)


def test_two_dimensional_parameter_is_a_linear() -> None:
    a, b, x = torch.randn(2, 5), torch.randn(4, 2), torch.randn(3, 5)
    delta = low_rank.delta(a, b, torch.Size((4, 5)))
    torch.testing.assert_close(F.linear(x, delta), low_rank.linear(x, a, b), **CLOSE)
