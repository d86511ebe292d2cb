"""What a call of the model was told, told again when its gradients come.

A block under gradient checkpointing is computed again in the backward pass, and then needs what was said in its own
call, which may not be the last one: there may be two calls before one `backward`, or an evaluation before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def recalled(output: Any, tell: Callable[[], None]) -> None:
    """From now on `tell` is called whenever gradients reach anything that this output of the model holds."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(lambda _: tell())  # type: ignore[no-untyped-call]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for one in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(one)
