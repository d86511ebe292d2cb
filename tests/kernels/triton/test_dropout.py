"""Dropout drawn in the kernels: the generator, the mask's statistics, and one mask in all three products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inlay.errors import ConfigError
from inlay.kernels.triton import dropout, philox

SEED = 2**62 + 12345
ROWS, COLUMNS, RANK = 37, 75, 5
F32 = {"rtol": 1e-5, "atol": 2e-5}  # sums of at most a hundred products in two orders


def mask_of_product(rows: int, columns: int, p: float, seed: int) -> Tensor:
    """The mask that the kernel of h used: with x all ones and A the identity, h is the mask."""
    return dropout.dropped_product(torch.ones(rows, columns), torch.eye(columns), p, seed)


def mask_of_input(rows: int, columns: int, p: float, seed: int) -> Tensor:
    """The mask of dx: dh A is all ones."""
    dx = torch.zeros(rows, columns)
    assert dropout.dropped_gradients_(dx, None, torch.ones(rows, 1), torch.ones(1, columns), p, seed) is None
    return dx


def mask_of_factor(rows: int, columns: int, p: float, seed: int) -> Tensor | None:
    """The mask of dA: dh is the identity and x all ones."""
    x, a = torch.ones(rows, columns), torch.zeros(rows, columns)
    return dropout.dropped_gradients_(None, x, torch.eye(rows), a, p, seed)


def test_words_are_those_of_the_published_vectors() -> None:
    """The first and last known answers for philox4x32-10 that come with Random123."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = philox.philox((zero, zero, zero, zero), 0)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    counter = [torch.tensor([word]) for word in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    words = philox.philox(tuple(counter), 0x299F31D0_A4093822)  # type: ignore[arg-type]
    assert [int(word) for word in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize(("rows", "columns", "seed"), [(37, 61, SEED), (16, 64, 0), (5, 3, 7)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_one_mask_in_all_three_products_and_in_torch(rows: int, columns: int, seed: int, p: float) -> None:
    expected = philox.reference(rows, columns, p, seed).float()
    assert 0 < expected.mean() < 1
    assert torch.equal(mask_of_product(rows, columns, p, seed), expected)
    assert torch.equal(mask_of_input(rows, columns, p, seed), expected)
    factor = mask_of_factor(rows, columns, p, seed)
    assert factor is not None
    assert torch.equal(factor, expected)


def test_an_entry_whose_word_is_the_threshold_is_kept() -> None:
    """So that p · 2¹⁶ of the 2¹⁶ words are dropped: the first entry's word, and the one above it, as thresholds."""
    zero = torch.zeros(1, dtype=torch.int64)
    word = int(philox.philox((zero, zero, zero, zero), SEED)[0]) & 0xFFFF
    assert 0 < word < 2**16 - 1
    for level, kept in ((word, 1.0), (word + 1, 0.0)):
        assert mask_of_product(1, 8, level / 2**16, SEED)[0, 0] == kept
        assert float(philox.reference(1, 8, level / 2**16, SEED)[0, 0]) == kept


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_statistics_of_the_mask(p: float) -> None:
    """Within five standard errors: the share dropped, that of each row and column, and neighbours' independence."""
    rows, columns = 256, 1024
    dropped = (~philox.reference(rows, columns, p, SEED)).double()
    error = math.sqrt(p * (1 - p))
    assert abs(dropped.mean() - p) < 5 * error / math.sqrt(rows * columns)
    assert (dropped.mean(1) - p).abs().max() < 6 * error / math.sqrt(columns)  # the largest of many: six
    assert (dropped.mean(0) - p).abs().max() < 6 * error / math.sqrt(rows)
    centred = (dropped - p) / error
    for step in (1, 2, 4, 8):
        assert abs((centred[:, step:] * centred[:, :-step]).mean()) < 5 / math.sqrt(rows * (columns - step))
        assert abs((centred[step:] * centred[:-step]).mean()) < 5 / math.sqrt((rows - step) * columns)


def test_another_seed_is_another_mask() -> None:
    first, low, high = (philox.reference(64, 64, 0.5, seed) for seed in (SEED, SEED + 1, SEED + 2**40))
    for other in (low, high):
        # Independent masks agree in half of the 4,096 places, give or take 32 at one standard error.
        assert abs(int((first == other).sum()) - 2048) < 5 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_equals_the_products_with_that_mask(p: float, dtype: torch.dtype) -> None:
    x, dh = torch.randn(ROWS, COLUMNS).to(dtype), torch.randn(ROWS, RANK).to(dtype)
    a, dx = torch.randn(RANK, COLUMNS), torch.randn(ROWS, COLUMNS).to(dtype)
    mask = philox.reference(ROWS, COLUMNS, p, SEED)
    assert bool(mask.all()) == (p == 0)
    wide, rounded = (x * mask).double(), a.to(dtype).double()
    # In bfloat16 each result is rounded once, but dA, which keeps the master's float32.
    close = F32 if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-5}
    h = dropout.dropped_product(x, a, p, SEED)
    assert h.dtype == dtype
    torch.testing.assert_close(h.double(), wide @ rounded.T, **close)
    expected = dx.double() + (dh.double() @ rounded) * mask
    da = dropout.dropped_gradients_(dx, x, dh, a, p, SEED)
    assert da is not None
    torch.testing.assert_close(dx.double(), expected, **close)
    torch.testing.assert_close(da, (dh.double().T @ wide).float(), **F32)


def test_references_are_those_products() -> None:
    x, dh, a = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, RANK), torch.randn(RANK, COLUMNS)
    torch.testing.assert_close(dropout.dropped_product(x, a, 0.2, 3), dropout.reference_product(x, a, 0.2, 3), **F32)
    dx = torch.randn(ROWS, COLUMNS)
    expected = dropout.reference_gradients(dx.clone(), x, dh, a, 0.2, 3)
    da = dropout.dropped_gradients_(dx, x, dh, a, 0.2, 3)
    torch.testing.assert_close((dx, da), expected, **F32)


def test_gradients_are_autograds() -> None:
    x, a = torch.randn(ROWS, COLUMNS, requires_grad=True), torch.randn(RANK, COLUMNS, requires_grad=True)
    dh = torch.randn(ROWS, RANK)
    dropout.reference_product(x, a, 0.3, SEED).backward(dh)
    dx = torch.zeros(ROWS, COLUMNS)
    da = dropout.dropped_gradients_(dx, x.detach(), dh, a.detach(), 0.3, SEED)
    torch.testing.assert_close(dx, x.grad, **F32)
    torch.testing.assert_close(da, a.grad, **F32)


def test_either_gradient_alone_is_the_same() -> None:
    x, dh, a = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, RANK), torch.randn(RANK, COLUMNS)
    both, alone = torch.zeros(ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS)
    da = dropout.dropped_gradients_(both, x, dh, a, 0.1, SEED)
    assert dropout.dropped_gradients_(alone, None, dh, a, 0.1, SEED) is None
    assert torch.equal(both, alone)
    only = dropout.dropped_gradients_(None, x, dh, a, 0.1, SEED)
    assert da is not None
    assert only is not None
    assert torch.equal(da, only)
    assert dropout.dropped_gradients_(None, None, dh, a, 0.1, SEED) is None


def test_empty_batch() -> None:
    assert dropout.dropped_product(torch.ones(0, 6), torch.ones(2, 6), 0.1, 1).shape == (0, 2)
    da = dropout.dropped_gradients_(torch.ones(0, 6), torch.ones(0, 6), torch.ones(0, 2), torch.ones(2, 6), 0.1, 1)
    assert da is not None
    assert torch.equal(da, torch.zeros(2, 6))


@pytest.mark.parametrize("p", [-0.1, 1.0, 1 - 1e-6])
def test_a_probability_that_keeps_nothing_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match="give a probability of at least 0 and below 1"):
        dropout.dropped_product(torch.ones(2, 6), torch.ones(2, 6), p, 1)
