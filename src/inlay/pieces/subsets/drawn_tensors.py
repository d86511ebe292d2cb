"""Which tensors the authors of APET draw: groups of inserted ones and single ones of the base, half of n for each.

Python's generator, seeded with n · seed, shuffles the groups and then the base's tensors. Either list is gone through
once: what fits into the rest of its half is taken. Of a group only the first tensor is asked whether it fits, and all
are counted, so that the last group may go over.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def drawn(groups: Sequence[Sequence[int]], tensors: Sequence[int], budget: int, seed: int) -> tuple[list[int], ...]:
    """(numbers of the groups taken, numbers of the base's tensors taken), each sorted; all are given by their sizes."""
    draw = random.Random(budget * seed)
    orders = [list(range(len(groups))), list(range(len(tensors)))]
    for order in orders:
        draw.shuffle(order)
    asked = ([group[0] for group in groups], list(tensors))
    counted = ([sum(group) for group in groups], list(tensors))
    return tuple(_fitting(*lists, budget // 2) for lists in zip(orders, asked, counted, strict=True))


def _fitting(order: Sequence[int], asked: Sequence[int], counted: Sequence[int], left: int) -> list[int]:
    taken = []
    for number in order:
        if left <= 0:
            break
        if asked[number] <= left:
            taken.append(number)
            left -= counted[number]
    return sorted(taken)
