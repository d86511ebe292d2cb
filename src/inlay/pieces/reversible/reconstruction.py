"""The reversible stacks of a model, from outside: with and without inversion, and how exact inversion is."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from inlay.engine.adapters import find_adapters
from inlay.errors import AdapterError
from inlay.pieces.reversible.stack import Recorded, ReversibleBlock, ReversibleStack


@dataclasses.dataclass(frozen=True)
class Running:
    """A stack of an active adapter, and its blocks with their paths."""

    stack: ReversibleStack
    paths: tuple[str, ...]
    blocks: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        """What its blocks lie in, and which they are: "encoder.layer[0-11]"."""
        container, _, first = self.paths[0].rpartition(".")
        return f"{container}[{first}-{self.paths[-1].rpartition('.')[2]}]"


def running(model: nn.Module) -> list[Running]:
    """The reversible stacks of the active adapters; those of the last one activated come last."""
    found: dict[int, list[tuple[ReversibleStack, str, nn.Module]]] = {}
    adapters = find_adapters(model)
    for site, piece in adapters.active_pieces() if adapters is not None else ():
        if isinstance(piece, ReversibleBlock):
            found.setdefault(id(piece.stack), []).append((piece.stack, site.path, site.module))
    return [
        Running(blocks[0][0], tuple(path for _, path, _ in blocks), tuple(module for _, _, module in blocks))
        for blocks in found.values()
    ]


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Within the block passes keep what autograd keeps: the same computation, and nothing is inverted."""
    with contextlib.ExitStack() as contexts:
        for found in running(model):
            contexts.enter_context(found.stack.inverting(False))
        yield


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """How well the blocks' inputs are found again: for each block, from the bottom, the largest error of a stream that
    enters it, relative to the streams' largest entry. 0 where streams are kept, and for what a pass begins with.
    """

    errors: tuple[float, ...]
    bound: float
    """What the error bound allows at most."""

    @property
    def worst(self) -> float:
        """The largest of them."""
        return max(self.errors)


def reconstruction_error(model: nn.Module, *args: Any, every: int | None = None, **kwargs: Any) -> Reconstruction:
    """Call the model with these arguments and compare the streams that inversion finds with the true ones.

    `every` replaces the number of blocks between two kept streams: the depth of the model asks what would happen
    without keeping any. AdapterError where no MEFT adapter is active. Memory: both streams of every block.
    """
    stacks = [found.stack for found in running(model)]
    if not stacks:
        raise AdapterError("reconstruction_error needs an active MEFT adapter: attach or activate one")
    for stack in stacks:
        stack.record = []
    try:
        with torch.no_grad():
            model(*args, **kwargs)
        records = [(stack, stack.record or []) for stack in stacks]
    finally:
        for stack in stacks:
            stack.record = None
    errors: list[float] = []
    bounds: list[float] = []
    for stack, record in records:
        length = every or stack.every
        errors += _errors(record, length)
        bounds += [stack.bound(min(length, len(record)) - 1, record[0].into[0].dtype)] if record else []
    return Reconstruction(tuple(errors), max(bounds))


def _errors(record: Sequence[Recorded], every: int) -> list[float]:
    """From the top of each segment down; the inputs of its first call are kept."""
    errors = [0.0] * len(record)
    for start in range(0, len(record), every):
        last = min(start + every, len(record)) - 1
        y1, y2 = record[last].out
        for number in range(last, start, -1):
            call, tensors, into, _ = record[number]
            found = call.inverse(y1, y2, tensors)
            largest = max(float(x.abs().max()) for x in into)
            wrong = max(float((x - truth).abs().max()) for x, truth in zip(found, into, strict=True))
            errors[number] = wrong / largest
            y1, y2 = call.below(*found)
    return errors
