"""Coupled streams: inversion, gradients without what autograd keeps, repeated random numbers, and the error bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from oracles.plain_formulas import kept, size
from torch import Tensor, nn

from inlay.errors import UnsupportedError
from inlay.kernels.reversible import Call, Segment, error_bound, longest_segment, reversible

COUPLINGS = [((0.1, 1.0), True), ((1.0, 0.1), True), ((0.1, 0.1), False), ((0.5, 0.7), False)]
WIDTH = 6


class Blocks(nn.Module):
    """A stack whose F and G are linears with dropout and a given tensor in between."""

    def __init__(self, depth: int, scales: tuple[float, float], swapped: bool, dropout: float = 0.3) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.second = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.scales, self.swapped, self.dropout = scales, swapped, dropout

    def call(self, number: int) -> Call:
        def part(linear: nn.Module) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
            return lambda x, tensors: F.dropout(torch.tanh(linear(x) * tensors[0]), self.dropout).to(x.dtype)

        return Call(part(self.first[number]), part(self.second[number]), self.scales, self.swapped)

    def forward(self, x: Tensor, given: Tensor, every: int | None) -> Tensor:
        x1 = x2 = x
        segment, depth = Segment(), len(self.first)
        for number in range(depth):
            call = self.call(number)
            if every is None:
                y1, y2 = call.forward(x1, x2, [given])
            else:
                if number % every == 0:
                    segment = Segment()
                ends = (number % every == 0, number % every == every - 1 or number == depth - 1)
                own = [*self.first[number].parameters(), *self.second[number].parameters()]
                y1, y2 = reversible(call, segment, ends, x1, x2, [given], own)
            x1, x2 = (y2, y1) if self.swapped else (y1, y2)
        return (x1 + x2) / 2


def made(depth: int, scales: tuple[float, float], swapped: bool) -> tuple[Blocks, Tensor, Tensor]:
    torch.manual_seed(0)
    blocks = Blocks(depth, scales, swapped).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    return blocks, x, torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)


def gradients(blocks: Blocks, x: Tensor, given: Tensor, every: int | None) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(7)
    y = blocks(x, given, every)
    return y.detach(), list(torch.autograd.grad(y.square().sum(), [x, given, *blocks.parameters()]))


@pytest.mark.parametrize(("scales", "swapped"), COUPLINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_one_call_finds_its_inputs_again(
    scales: tuple[float, float], swapped: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    call, given = Blocks(1, scales, swapped).to(dtype).call(0), torch.randn(WIDTH, dtype=dtype)
    x1, x2 = torch.randn(2, 5, WIDTH, dtype=dtype)
    found = call.inverse(*call.forward(x1, x2, [given], remember=True), [given])
    for one, truth in zip(found, (x1, x2), strict=True):
        assert (one - truth).abs().max() < tolerance * truth.abs().max()


@pytest.mark.parametrize(("scales", "swapped"), COUPLINGS)
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_gradients_are_those_of_the_graph_with_nothing_inverted(
    scales: tuple[float, float], swapped: bool, every: int
) -> None:
    blocks, x, given = made(5, scales, swapped)
    y, expected = gradients(blocks, x, given, None)
    again, found = gradients(blocks, x, given, every)
    assert torch.equal(again, y)  # the same dropout too
    bound = error_bound(scales, (1.0, 1.0), swapped, every - 1, torch.float64)
    for one, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(one, truth, rtol=0, atol=float(truth.abs().max()) * max(1e-13, 100 * bound))
        if every == 1:
            assert torch.equal(one, truth) or (one - truth).abs().max() <= 1e-14 * truth.abs().max()


@pytest.mark.parametrize(("scales", "swapped"), COUPLINGS[:3])
def test_what_is_kept_does_not_grow_with_the_calls_of_a_segment(scales: tuple[float, float], swapped: bool) -> None:
    sizes = {}
    for depth in (2, 6):
        blocks, x, given = made(depth, scales, swapped)
        with kept(given, *blocks.parameters()) as found:
            y = blocks(x, given, depth)
        sizes[depth] = size(found)
        torch.autograd.grad(y.sum(), x)
    assert sizes[2] == sizes[6] == 3 * x.numel() * 8  # what it began with, and two streams


def test_a_backward_pass_can_be_repeated() -> None:
    blocks, x, given = made(4, (0.5, 0.5), False)
    y = blocks(x, given, 2).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_hooks_on_trained_tensors_run_once() -> None:
    blocks, x, given = made(3, (0.5, 0.5), False)
    blocks.dropout = 0.0
    for parameter in (given, *blocks.parameters()):
        parameter.register_hook(lambda gradient: 3 * gradient)
    found = {}
    for every in (3, None):
        blocks.zero_grad()
        blocks(x, given, every).square().sum().backward()
        found[every] = [parameter.grad.clone() for parameter in blocks.parameters() if parameter.grad is not None]
    for one, truth in zip(found[3], found[None], strict=True):
        torch.testing.assert_close(one, truth)


def test_a_second_derivative_is_refused() -> None:
    blocks, x, given = made(2, (0.5, 0.5), False)
    (first,) = torch.autograd.grad(blocks(x, given, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_random_state_goes_on_as_if_nothing_had_been_repeated() -> None:
    blocks, x, given = made(3, (0.5, 0.5), False)
    torch.manual_seed(1)
    y = blocks(x, given, 3)
    expected = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_repeated(inside: bool) -> None:
    torch.manual_seed(0)
    blocks, given = Blocks(3, (0.5, 0.5), False, dropout=0.0), torch.randn(WIDTH)
    x = torch.randn(3, WIDTH, requires_grad=True)

    def run(every: int | None) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = blocks(x, given, every).sum()
            if inside:
                return list(torch.autograd.grad(y, [x, *blocks.parameters()]))
        return list(torch.autograd.grad(y, [x, *blocks.parameters()]))

    for one, truth in zip(run(3), run(None), strict=True):
        # bfloat16 keeps 8 bits, and an input that is off in its last fp32 bit may round to the next of them
        torch.testing.assert_close(one, truth, rtol=0, atol=0.02 * float(truth.abs().max()))


def test_a_trained_tensor_that_nobody_named_is_refused() -> None:
    blocks, x, given = made(1, (0.5, 0.5), False)
    y1, y2 = reversible(blocks.call(0), Segment(), (True, True), x, x, [given], list(blocks.first.parameters()))
    with pytest.raises(UnsupportedError, match=r"a trained tensor of shape .* would get no gradient"):
        (y1 + y2).sum().backward()


def test_a_stack_whose_last_block_did_not_run_is_refused() -> None:
    blocks, x, given = made(1, (0.5, 0.5), False)
    y1, y2 = reversible(blocks.call(0), Segment(), (True, False), x, x, [given], list(blocks.parameters()))
    with pytest.raises(UnsupportedError, match=r"every block must run.*layerdrop"):
        (y1 + y2).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scales", "swapped"), COUPLINGS)
def test_the_bound_holds_for_maps_of_known_gain(scales: tuple[float, float], swapped: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    width, depth = 64, 6
    # x -> g·|Px|, P a permutation: no entry of the output is off by more than g times the worst of the input
    parts = [(torch.randperm(width), gain) for _ in range(depth) for gain in (1.0, 0.5)]

    def part(order: Tensor, gain: float) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
        return lambda x, tensors: gain * x[..., order].abs()

    calls = [Call(part(*parts[2 * n]), part(*parts[2 * n + 1]), scales, swapped) for n in range(depth)]
    streams, x = [], (torch.randn(8, width, dtype=dtype), torch.randn(8, width, dtype=dtype))
    for call in calls:
        streams.append(x)
        y = call.forward(*x, [], remember=True)
        x = y[::-1] if swapped else y
    largest = max(float(one.abs().max()) for pair in (*streams, y) for one in pair)
    for inversions, (call, truth) in enumerate(zip(reversed(calls), reversed(streams), strict=True), 1):
        found = call.inverse(*y, [])
        worst = max(float((one - true).abs().max()) for one, true in zip(found, truth, strict=True))
        assert worst <= largest * error_bound(scales, (1.0, 0.5), swapped, inversions, dtype)
        y = call.below(*found)


def test_the_longest_segment_is_the_longest_within_the_tolerance() -> None:
    for scales, swapped in COUPLINGS:
        for tolerance in (1e-6, 1e-4, 1e-2):
            k = longest_segment(scales, (2.0, 2.0), swapped, torch.float32, tolerance, most=9)
            bounds = [error_bound(scales, (2.0, 2.0), swapped, n, torch.float32) for n in range(9)]
            assert k == 1 or bounds[k - 1] <= tolerance
            assert k == 9 or bounds[k] > tolerance
    assert error_bound((0.1, 0.1), (1.0, 1.0), False, 0, torch.float32) == 0.0
