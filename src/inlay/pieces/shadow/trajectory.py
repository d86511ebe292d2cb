"""The shadow's state on its way through the blocks of one call, and its keys and values in the model's cache."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import UnsupportedError

STATIC = "Shadow's own keys and values have no place in a static cache: leave cache_implementation unset"
FOREIGN = "Shadow cannot go on from a cache that was filled without it: start with an empty one"
ALONE = (
    "Shadow was called in a block by itself, without the model around it (as a checkpoint around single blocks does in "
    "the backward pass): use the model's own gradient_checkpointing_enable"
)
REENTRANT = (
    "a reentrant checkpoint around a block loses the gradients of Shadow's state: use the model's own "
    "gradient_checkpointing_enable, with one active Shadow adapter, or use_reentrant=False"
)


class Trajectory:
    """What the pieces of one shadow share during a call."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        """By which it knows its layers in a cache, copies of both included."""
        self.first: Tensor | None = None
        """s⁰, while the piece that makes a loss of it waits for it."""
        self.awaited = False
        self._forget()

    def _forget(self) -> None:
        self.state: Tensor | None = None
        self.checkpointed: frozenset[int] = frozenset()
        """Blocks (by id) that the pieces checkpoint themselves."""

    @contextlib.contextmanager
    def run(self, state: Tensor, blocks: Sequence[Any]) -> Iterator[None]:
        """Within the block the state is on its way, and the model's blocks leave checkpointing to the pieces.

        (A checkpoint of theirs is given the hidden states alone: the older kind would lose the state's gradients, and
        both would find no state when the block is computed again.)
        """
        graded = torch.is_grad_enabled()
        mine = [b for b in blocks if graded and b.training and getattr(b, "gradient_checkpointing", False)]
        self.state, self.first = state, state if self.awaited else None
        self.checkpointed = frozenset(map(id, mine))
        for block in mine:
            block.gradient_checkpointing = False
        try:
            yield
        finally:
            for block in mine:
                block.gradient_checkpointing = True
            self._forget()

    def now(self) -> Tensor:
        """The state before the block that is called. UnsupportedError where it is not there, or lost its gradients."""
        if self.state is None:
            raise UnsupportedError(ALONE)
        if self.state.requires_grad and not torch.is_grad_enabled():
            raise UnsupportedError(REENTRANT)
        return self.state

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "first": None, "awaited": False, "state": None, "checkpointed": frozenset()}


def take_own(cache: Any, network: nn.Module, mark: str) -> Any:
    """The shadow's own cache: its layers, taken out of the model's (None: there is none yet), or a new one.

    They lie in the model's cache between calls, so that what reorders, repeats or crops that does it to both.
    """
    from transformers import DynamicCache

    own = DynamicCache(config=network.config)  # type: ignore[arg-type]
    if cache is None:
        return own
    if getattr(cache, "is_compileable", False):
        raise UnsupportedError(STATIC)
    found = [layer for layer in cache.layers if getattr(layer, "shadow", None) == mark]
    cache.layers = [layer for layer in cache.layers if getattr(layer, "shadow", None) != mark]
    if found:
        own.layers = found
    if own.get_seq_length() != cache.get_seq_length():
        cache.layers = [*cache.layers, *found]
        raise UnsupportedError(FOREIGN)
    return own


def put_back(cache: Any, own: Any, mark: str) -> None:
    """Leave the shadow's layers in the model's cache, behind its own."""
    for layer in own.layers:
        layer.shadow = mark
    cache.layers = [*cache.layers, *own.layers]
