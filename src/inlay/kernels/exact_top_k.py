"""The k largest of more numbers than one would sort: exactly k of them, the first ones of those that are equal.

The numbers come as several tensors, which may be made anew each time they are asked for. Two passes count them by
their upper and then by their lower bits, which gives the k-th largest; a third takes what lies above it, and as many of
its equals, in order, as are missing. No random numbers, no sort, no copy of all numbers: the result is the same on
every machine, and what is held is a million numbers and a count for each of 65,536 classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from inlay.errors import TrainingError

HALF = 16
CHUNK = 1 << 20
Numbers = Callable[[], Iterable[Tensor]]
"""Gives the tensors, the same each time: fp32, none negative."""


def largest(numbers: Numbers, count: int) -> list[Tensor]:
    """For each tensor, flattened, the sorted indices (int64) of its entries among the `count` largest of all."""
    if not count:
        return [torch.zeros(0, dtype=torch.int64) for _ in numbers()]
    limit, equals = kth(numbers, count)
    found = []
    for tensor in numbers():
        parts, start = [torch.zeros(0, dtype=torch.int64, device=tensor.device)], 0
        for bits in ranked(tensor):
            chosen = bits > limit
            same = (bits == limit).nonzero().flatten()[:equals]
            equals -= len(same)
            chosen[same] = True
            parts.append(chosen.nonzero().flatten() + start)
            start += len(bits)
        found.append(torch.cat(parts))
    return found


def above(numbers: Numbers, threshold: float) -> list[Tensor]:
    """For each tensor, flattened, the sorted indices of its entries of at least `threshold`."""
    return [(tensor.flatten() >= threshold).nonzero().flatten() for tensor in numbers()]


def kth(numbers: Numbers, count: int) -> tuple[int, int]:
    """The `count`-th largest as an integer of the same order, and how many of its equals are among the `count`."""
    upper = _counted(lambda bits: bits >> HALF, numbers, 1 << (31 - HALF))
    high, left = _reached(upper, count)
    lower = _counted(lambda bits: bits[bits >> HALF == high] & 0xFFFF, numbers, 1 << HALF)
    low, left = _reached(lower, left)
    return (high << HALF) | low, left


def ranked(tensor: Tensor) -> Iterator[Tensor]:
    """fp32 numbers, none negative, as integers of the same order: their bits, piece by piece. TrainingError for what is
    no number.
    """
    for chunk in torch.split(tensor.detach().flatten(), CHUNK):
        if not bool(chunk.isfinite().all()):
            raise TrainingError(
                "a score is no finite number: the loss or its gradients overflowed; score in fp32 (dtype)"
            )
        yield (chunk.float() + 0.0).view(torch.int32)  # of the two zeros, the one whose bits are 0


def _counted(part: Callable[[Tensor], Tensor], numbers: Numbers, classes: int) -> Tensor:
    total = torch.zeros(classes, dtype=torch.int64)
    for tensor in numbers():
        for bits in ranked(tensor):
            total += torch.bincount(part(bits), minlength=classes).cpu()
    return total


def _reached(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The class that the `wanted`-th largest is in, and how many are wanted of that class."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, wanted))
    return len(counts) - 1 - place, wanted - int(from_top[place] - counts.flip(0)[place])


def shares(sizes: Sequence[int], budget: int) -> list[int]:
    """The budget divided in proportion to sizes, to the last one: what rounding leaves goes to the largest remainders,
    the first of equal ones first.
    """
    total = sum(sizes)
    whole = [size * budget // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda place: -(sizes[place] * budget % total))
    for place in order[: budget - sum(whole)]:
        whole[place] += 1
    return whole


def packed(scores: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Groups in the order of their scores, each taken if it still fits: their numbers, sorted.

    What is left of the budget is less than any group left out.
    """
    order = scores.sort(descending=True, stable=True).indices.tolist()
    cost = sizes.tolist()
    smallest, taken = min(cost), []
    for number in order:
        if cost[number] <= budget:
            taken.append(number)
            budget -= cost[number]
            if budget < smallest:
                break
    return torch.tensor(sorted(taken), dtype=torch.int64)
