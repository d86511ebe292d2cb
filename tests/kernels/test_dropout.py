"""Packed dropout masks: their statistics, where their randomness comes from, and that applying them is exact."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from oracles.plain_formulas import attached, gradients, kept, leaf, same_mask, size, trained
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from inlay.kernels import dropout

CPU = torch.device("cpu")


def keeps(p: float, *shape: int) -> Tensor:
    """1 for what is kept."""
    return dropout.unpack(dropout.draw(torch.Size(shape), p, CPU), torch.Size(shape))


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.001, 0.01, 1 / 64, 0.1, 0.25, 0.5, 0.9, 0.99, 0.999])
def test_entries_are_dropped_with_the_probability_asked_for(p: float) -> None:
    n = 4_000_000
    dropped = n - int(keeps(p, 4000, 1000).sum())
    assert abs(dropped / n - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("p", [1e-6, 1 - 1e-6])
def test_probabilities_finer_than_two_bytes_count_too(p: float) -> None:
    """1e-6 lies between the thresholds 0 and 1 of 65,536; 1 − 1e-6 between the last and one that no word can reach."""
    rare = keeps(p, 200_000, 40) == (p > 0.5)
    assert abs(int(rare.sum()) - 8) < 4 * math.sqrt(8)


def test_a_probability_between_two_bytes_is_met_exactly_not_rounded_to_one() -> None:
    """0.1 is 25.6 / 256: with 25 or 26 for all, the share dropped would be 0.0977 or 0.1016, 16 and 10 errors away."""
    n = 4_000_000
    error = math.sqrt(0.1 * 0.9 / n)
    assert abs(25 / 256 - 0.1) > 10 * error
    assert abs(1 - float(keeps(0.1, 4000, 1000).double().mean()) - 0.1) < 4 * error


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_entries_do_not_depend_on_each_other(p: float) -> None:
    dropped = 1 - keeps(p, 2000, 512).double()
    noise = (dropped - p) / math.sqrt(p * (1 - p))
    along = float((noise[:, 1:] * noise[:, :-1]).mean())  # neighbours in a row
    across = float((noise[1:] * noise[:-1]).mean())  # neighbours in a column
    far = float((noise[:, 8:] * noise[:, :-8]).mean())  # the entries of one 64-bit word
    # A mean of about a million products of variance one; entries of a row are correlated by up to 4e-5 as documented.
    assert max(abs(along), abs(across), abs(far)) < 4 / math.sqrt(noise.numel() - 8 * 2000) + 4e-5
    for means, count in ((noise.mean(0), 2000), (noise.mean(1), 512)):  # no column and no row stands out
        assert float(means.abs().max()) < 6 / math.sqrt(count)
        assert float(means.var()) == pytest.approx(1 / count, rel=0.3)


# -- where the randomness comes from -----------------------------------------------------------------------------------


def test_torchs_seed_decides_and_every_call_is_another() -> None:
    torch.manual_seed(5)
    first, second = keeps(0.5, 30, 40), keeps(0.5, 30, 40)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(keeps(0.5, 30, 40), first)
    state = torch.get_rng_state()
    third = keeps(0.5, 30, 40)
    torch.set_rng_state(state)
    assert torch.equal(keeps(0.5, 30, 40), third)


def test_numpys_global_generator_is_neither_read_nor_moved() -> None:
    masks = []
    for seed in (1, 2):
        np.random.seed(seed)
        before = np.random.get_state()[1].copy()
        torch.manual_seed(5)
        masks.append(keeps(0.1, 30, 40))
        assert (np.random.get_state()[1] == before).all()
    assert torch.equal(*masks)


@pytest.mark.parametrize(("p", "training", "moves"), [(0.0, True, False), (0.3, False, False), (0.3, True, True)])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_nothing_is_drawn_where_nothing_is_dropped(kind: str, p: float, training: bool, moves: bool) -> None:
    model = attached(kind, dropout=p).train(training)
    x = torch.randn(4, 6)
    state = torch.get_rng_state()
    y = model(x)
    assert torch.equal(torch.get_rng_state(), state) != moves
    assert torch.equal(model(x), y) != moves


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_with_the_same_mask(kind: str, reentrant: bool) -> None:
    model = attached(kind, dropout=0.4)
    x = torch.randn(9, 6, requires_grad=True)
    torch.manual_seed(3)
    expected = gradients(model(x), *trained(model).values(), x)
    torch.manual_seed(3)
    y = checkpoint(model, x, use_reentrant=reentrant)
    model.zero_grad()
    weights = torch.linspace(-1, 1.3, y.numel(), dtype=torch.float64).reshape(y.shape).float()
    y.backward(weights)
    found = [p.grad for p in (*trained(model).values(), x)]
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_copies_with_the_same_seed_drop_the_same() -> None:
    model = attached("lora", dropout=0.4)
    x = torch.randn(4, 6)
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    assert torch.equal(copy.deepcopy(model)(x), y)


# -- applying ----------------------------------------------------------------------------------------------------------


SHAPES = [(0, 5), (1,), (7,), (3, 8), (5, 13), (2, 3, 9), (2, 0, 3), (2, 3, 2, 17)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.001, 0.3])
def test_a_mask_is_one_bit_an_entry_and_clears_exactly_its_entries(
    shape: tuple[int, ...], dtype: torch.dtype, p: float
) -> None:
    x = torch.randn(*shape).to(dtype)
    mask = dropout.draw(x.shape, p, CPU)
    assert mask.dtype == torch.uint8
    assert mask.shape == (math.ceil(x.numel() / 8),)
    ones = dropout.unpack(mask, x.shape).bool()
    truth = torch.where(ones, x, torch.zeros((), dtype=dtype))
    assert torch.equal(dropout.apply(x, mask), truth)
    own = x.clone()
    assert dropout.apply_(own, mask) is own
    assert torch.equal(own, truth)


def test_a_strided_x_is_masked_in_the_order_of_its_entries() -> None:
    wide = torch.randn(6, 10)
    for x in (wide.t(), wide[:, ::2], wide[:1].expand(6, 10), wide[2:, 3:]):
        mask = dropout.draw(x.shape, 0.5, CPU)
        assert torch.equal(dropout.apply(x, mask), x * dropout.unpack(mask, x.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_dropped_is_zero_whatever_it_was(dtype: torch.dtype) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-40, -3.0, 2.0, math.nan], dtype=dtype).repeat(16)
    mask = dropout.draw(x.shape, 0.5, CPU)
    ones = dropout.unpack(mask, x.shape).bool()
    found = dropout.apply(x, mask)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found[ones].view(bits), x[ones].view(bits))  # not a bit of what is kept changes
    assert (found[~ones].view(bits) == 0).all()


@pytest.mark.parametrize("kind", ["packed", "bool"])
def test_the_differentiable_form_is_the_same_product(kind: str) -> None:
    x = leaf(5, 7, dtype=torch.float64)
    mask: Any = dropout.draw(x.shape, 0.5, CPU)
    if kind == "bool":
        mask = dropout.unpack(mask, x.shape).bool()
    assert torch.equal(dropout.apply(x, mask), same_mask(x, mask))
    assert torch.equal(dropout.apply_(x * 1, mask), same_mask(x, mask))
    assert torch.autograd.gradgradcheck(lambda t: dropout.apply(t, mask).square(), (x,))


def test_a_mask_off_the_cpu_drops_as_often() -> None:
    """Elsewhere torch's own generator draws a bool for each entry; "meta" shows which way is taken, without values."""
    mask = dropout.draw(torch.Size((3, 5)), 0.3, torch.device("meta"))
    assert (mask.dtype, mask.shape) == (torch.bool, (3, 5))


def test_a_layer_with_dropout_keeps_one_bit_more_for_each_entry_of_x() -> None:
    x = torch.randn(11, 6)
    with kept() as without:
        attached("lora", targets="last")(x)
    with kept() as found:
        attached("lora", targets="last", dropout=0.3)(x)
    assert size(found) - size(without) == math.ceil(11 * 8 / 8)
