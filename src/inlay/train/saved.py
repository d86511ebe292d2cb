"""What a training forward keeps for its backward pass, exactly, and by which module: a profile of one batch.

Counted are the distinct storages handed to autograd's saved-tensor hooks and still held when the forward ends, without
parameters and buffers. While a profile is taken nothing is in fact kept, so that a step which would not fit can be
profiled.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Storages = dict[int, int]
"""Storages by identity: their bytes."""


@dataclasses.dataclass
class Unit:
    """A module whose call can be treated as a whole: a block, or a part of one; or a run of blocks called in turn."""

    path: str
    module: nn.Module
    inputs: Storages = dataclasses.field(default_factory=dict)
    """What a recomputation of the call would start from."""
    flops: int = 0
    """Of the matrix products in the call."""
    calls: int = 0
    last: nn.Module | None = None
    """Of a run of blocks: the last one; `module` is the first."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """What one forward keeps: (storage, bytes, the paths of the units it was kept in) for each."""

    units: tuple[Unit, ...]
    held: tuple[tuple[int, int, frozenset[str]], ...]

    @property
    def total(self) -> int:
        """Bytes kept when nothing is done about it."""
        return self.kept({})

    def kept(self, treated: Mapping[str, Storages]) -> int:
        """Bytes kept when the units at these paths keep the given storages in place of what they would keep."""
        found = {key: size for key, size, within in self.held if not within & treated.keys()}
        for storages in treated.values():
            found.update(storages)
        return sum(found.values())


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating-point operations of matrix products and attentions."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it."""
        made = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=made)
        return made


class _Token:
    """Stands in the graph for a tensor; it lives as long as the graph would have kept that tensor."""


def profile(model: nn.Module, units: Sequence[Unit], forward: Callable[[], Any]) -> Profile:
    """Profile one `forward` with gradients. Its graph is dropped, and has kept nothing."""
    refs: list[Any] = []
    open_units: list[Unit] = []
    packed: list[tuple[int, int, frozenset[str], weakref.ref[_Token]]] = []

    def size(tensor: Tensor) -> tuple[int, int]:
        storage = tensor.untyped_storage()
        refs.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        return refs[
            -1
        ].cdata, storage.nbytes()  # while the weak reference is there, no other storage gets this identity

    fixed = {size(tensor)[0] for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> _Token:
        token, (key, count) = _Token(), size(tensor)
        if key not in fixed:
            packed.append((key, count, frozenset(unit.path for unit in open_units), weakref.ref(token)))
        return token

    flops = Flops()  # type: ignore[no-untyped-call]

    def enter(unit: Unit) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            unit.inputs = {key: count for key, count in map(size, tensors((args, kwargs))) if key not in fixed}
            unit.flops, unit.calls = -flops.total, unit.calls + 1
            open_units.append(unit)

        return hook

    def leave(unit: Unit) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            unit.flops += flops.total
            open_units.remove(unit)

        return hook

    handles = [unit.module.register_forward_pre_hook(enter(unit), with_kwargs=True) for unit in units]
    handles += [(unit.last or unit.module).register_forward_hook(leave(unit)) for unit in units]
    try:
        with flops, torch.autograd.graph.saved_tensors_hooks(pack, _unreadable):
            kept = forward()
        held = tuple((key, count, within) for key, count, within, token in packed if token() is not None)
        del kept
    finally:
        for handle in handles:
            handle.remove()
    return Profile(tuple(unit for unit in units if unit.calls), held)


def _unreadable(token: Any) -> Tensor:
    raise RuntimeError("a profiled forward has no backward pass")


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors(inner)
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for inner in value:
            yield from tensors(inner)
