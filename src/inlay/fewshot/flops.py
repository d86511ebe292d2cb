"""What an answer costs: the floating-point operations of a solution's forward passes, counted and not estimated.

A demonstration is read again with every query, which is why an answer of in-context learning costs many times that of a
tuned model. Every matrix product of the very passes that make the scores is counted, two operations for each product
and sum (torch's FlopCounterMode), with attention written out so that it is counted too. Rows go through one at a time:
no padding is in the count, and what a scorer shares between choices counts once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from inlay.errors import DataError
from inlay.fewshot.base import Base
from inlay.fewshot.predictor import Solution
from inlay.fewshot.prompts.template import Row


@dataclasses.dataclass(frozen=True)
class Cost:
    """The mean cost of one answer."""

    flops: float
    """Floating-point operations."""
    tokens: float
    """Tokens of the prompts, over all predictors and sets of demonstrations."""
    rows: int
    """How many rows it is the mean of."""


def cost(solution: Solution, base: Base, rows: Sequence[Row]) -> Cost:
    """The mean cost of answering these rows: a few that are like all others will do. Raises DataError without rows."""
    if not rows:
        raise DataError("there are no rows to count the cost of an answer on: give at least one")
    operations = tokens = 0
    with sdpa_kernel(SDPBackend.MATH):
        for predictor in solution.predictors:
            with _Counter() as counter:  # finding each row's demonstrations is part of its answer, loading is not
                sets = predictor.shown(base, rows)
            operations += counter.get_total_flops()
            with predictor.holding(base) as model, _Counter() as counter:
                for shown in sets:
                    predictor.scorer.scores(model, rows, demonstrations=shown, batch_size=1)
            operations += counter.get_total_flops()
            tokens += sum(len(example) for shown in sets for example in predictor.scorer.encode(rows, shown))
    return Cost(operations / len(rows), tokens / len(rows), len(rows))


class _Everywhere(contextlib.nullcontext[None]):
    """In place of the tracker of modules, which fails where a module is given a trained parameter without gradients."""

    parents = ("Global",)


class _Counter(FlopCounterMode):
    """Counts all operations together, those of bitsandbytes' quantised linears too."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_unknown_to_torch())
        self.mod_tracker: Any = _Everywhere()


def _unknown_to_torch() -> dict[Any, Callable[..., int]]:
    """Products that torch's counter passes over, and their operations, by the shapes of their arguments."""
    found: dict[Any, Callable[..., int]] = {
        torch.ops.aten.addmm_: lambda added, x, weight, *_, **__: 2 * math.prod(x) * weight[1]
    }
    if "bitsandbytes" in sys.modules:
        products: dict[str, Callable[..., int]] = {
            "gemm_4bit": lambda x, codes, weight, *_, **__: 2 * math.prod(x) * weight[0],
            "gemv_4bit": lambda x, codes, weight, *_, **__: 2 * math.prod(x) * weight[0],
            "int8_scaled_mm": lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0],
            "int8_mixed_scaled_mm": lambda x, rounded, weight, *_, **__: 2 * math.prod(x) * weight[0],
        }
        ours = torch.ops.bitsandbytes
        found |= {getattr(ours, name): count for name, count in products.items() if hasattr(ours, name)}
    return found
