"""The rows of a language model's output matrix that somebody asks for, and no others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.host import inlays_of
from inlay.fewshot.methods.restricted_head import output_of


@contextlib.contextmanager
def head_rows(model: Any, ids: Tensor) -> Iterator[bool]:
    """Within the block the model's logits have a column for each of `ids` (n,), in their order; yields whether so.

    They are what the whole head gives there, with gradients to its weight. Not so, and the head is as it was, where
    something else decides how the output is computed: a piece around its call, or a `forward` of its own.
    """
    head = output_of(model)
    inlays = None if head is None else inlays_of(head)
    around = inlays is not None and (not inlays.call().plain or inlays.own_forward is not None)
    if not isinstance(head, nn.Linear) or around or "forward" in vars(head):
        yield False
        return

    def rows(x: Tensor) -> Tensor:
        return F.linear(x, head.weight[ids], None if head.bias is None else head.bias[ids])

    vars(head)["forward"] = rows
    try:
        yield True
    finally:
        del vars(head)["forward"]
