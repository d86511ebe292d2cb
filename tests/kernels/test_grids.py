"""Changes of a weight that are a grid of blocks: what is applied to activations is the matrix, block by block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels import grids

T = 5
SHAPES = [(6,), (T, 6), (2, 3, 6), (0, 6)]
"""One row, some, those of a batch, and none: an expert may get no token."""


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("k", "r"), [(1, 3), (2, 2), (2, 6), (3, 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_exchanged_is_a_grid_of_blocks_of_low_rank(k: int, r: int, shape: tuple[int, ...]) -> None:
    x, y, a, b = leaf(*shape), leaf(*shape[:-1], 12), leaf(k, 6 // k, r), leaf(k, r, 12 // k)
    s = r // k
    for j in range(k):
        for n in range(k):
            block = (a[n, :, j * s : (j + 1) * s] @ b[j, n * s : (n + 1) * s]).T
            found = grids.exchanged_delta(a, b).view(k, 12 // k, k, 6 // k)[j, :, n]
            torch.testing.assert_close(found, block)
    torch.testing.assert_close(grids.exchanged(y, x, a, b), y + F.linear(x, grids.exchanged_delta(a, b)))
    assert torch.autograd.gradcheck(grids.exchanged, (y, x, a, b))
    assert torch.linalg.matrix_rank(grids.exchanged_delta(a, b)) == min(6, k * r)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factors", [(True, True), (True, False), (False, True)])
def test_kronecker_is_the_product_with_the_matrix(shape: tuple[int, ...], factors: tuple[bool, bool]) -> None:
    x, y, first = leaf(*shape), leaf(*shape[:-1], 20), leaf(5, 2)
    narrow, wide = (leaf(*size) if there else None for size, there in zip(((2, 3), (4, 2)), factors, strict=True))
    if narrow is None or wide is None:
        narrow, wide = (leaf(4, 3), None) if wide is None else (None, leaf(4, 3))
    second = narrow if wide is None else wide if narrow is None else wide @ narrow
    delta = grids.kronecker_delta(first, second)
    torch.testing.assert_close(delta, torch.kron(first, second))
    torch.testing.assert_close(grids.kronecker(y, x, first, narrow, wide), y + F.linear(x, delta))
    given = [tensor for tensor in (y, x, first, narrow, wide) if tensor is not None]
    places = (narrow is not None, wide is not None)

    def function(y: Tensor, x: Tensor, first: Tensor, *rest: Tensor) -> Tensor:
        left = iter(rest)
        return grids.kronecker(y, x, first, *(next(left) if there else None for there in places))

    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize("size", [1, 5, 12, 20, 36, 127, 128, 768])
@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 6, 7, 8, 500])
def test_sizes_are_split_as_peft_does(size: int, factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    assert grids.split(size, factor) == factorization(size, factor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [1, 2, 4, 6])
@pytest.mark.parametrize("n", [12, 4, 1])
def test_sharded_reads_every_r_inputs_and_writes_every_n_outputs_alike(shape: tuple[int, ...], r: int, n: int) -> None:
    x, y, block = leaf(*shape), leaf(*shape[:-1], 12), leaf(r, n)
    delta = grids.sharded_delta(block, (12, 6))
    entries = [[block[i % r, o % n] for i in range(6)] for o in range(12)]
    assert torch.equal(delta, torch.stack([torch.stack(row) for row in entries]))
    torch.testing.assert_close(grids.sharded(y, x, block), y + F.linear(x, delta))
    assert torch.autograd.gradcheck(grids.sharded, (y, x, block))


@pytest.mark.parametrize("stored", [(6, 4), (4, 6)])
def test_block_affine_delta_acts_on_each_block(stored: tuple[int, int]) -> None:
    weight, blocks = leaf(*stored), leaf(3, 2, 2)
    weight = weight if stored == (6, 4) else weight.t()  # a Conv1D's is not contiguous
    delta = grids.block_affine_delta(weight, blocks)
    for p in range(3):
        for q in range(2):
            block = weight[2 * p : 2 * p + 2, 2 * q : 2 * q + 2]
            expected = (block + torch.eye(2, dtype=torch.float64)) @ blocks[p]
            torch.testing.assert_close(delta[2 * p : 2 * p + 2, 2 * q : 2 * q + 2], expected)
