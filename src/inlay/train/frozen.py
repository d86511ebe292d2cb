"""The frozen part of a model: the blocks below the first trained one, as one traced training step finds them.

    hidden states after block i are fixed  ⇔  nothing that was called until then trains, none of it draws random
    numbers, and each block hands on one tensor alone

Nothing is known of any architecture: calls are watched by hooks, and blocks are those of `engine.sites`. While states
are served (`passing`), the frozen blocks hand them on instead of computing; the model's own forward runs as ever, so
masks, position embeddings and rotary tables are its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from inlay.engine.host import CHILD
from inlay.engine.sites import SiteIndex
from inlay.engine.structure import ancestors


class NotFixed(Exception):
    """Why the hidden states of a run cannot be kept. Its text is the end of a sentence, for a line or an error."""


class NothingFrozen(NotFixed):
    """The first block trains already."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The frozen lower blocks of a model."""

    blocks: tuple[nn.Module, ...]
    """From the bottom."""
    depth: int
    """How many blocks the model has."""
    modules: tuple[nn.Module, ...]
    """Everything whose call ends before the first trained block begins: the blocks, what is in them, embeddings."""
    outputs: tuple[Any, ...]
    """What each block returned: a tensor, or a tuple that begins with one; tensors here hold no values."""
    draws: bool
    """Whether any of it draws random numbers in training (dropout)."""
    width: int
    """Features of a hidden state."""
    tokens: int
    """Positions of the traced batch."""
    dtype: torch.dtype
    """Of the hidden states."""

    def silence(self) -> None:
        """Put the frozen part, and nothing else, into eval mode."""
        for module in self.modules:
            module.training = False


@dataclasses.dataclass
class Call:
    """One call of a block, as a trace saw it."""

    output: Any
    started: int
    ended: int
    states: tuple[Any, ...]


class Trace:
    """One forward pass: the modules called, in order of beginning and of ending, and the blocks' outputs."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.places = {id(block): index for index, block in enumerate(blocks)}
        self.started: list[nn.Module] = []
        self.ended: list[nn.Module] = []
        self.calls: list[tuple[int, Call]] = []
        self.states = random_states()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block every module's call is seen, of this model or any other."""
        handles = (
            hooks.register_module_forward_pre_hook(lambda module, _: self.started.append(module)),
            hooks.register_module_forward_hook(lambda module, _, output: self._end(module, output)),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _end(self, module: nn.Module, output: Any) -> None:
        self.ended.append(module)
        if id(module) in self.places:
            call = Call(output, len(self.started), len(self.ended), random_states())
            self.calls.append((self.places[id(module)], call))


def frozen_part(model: nn.Module, forward: Callable[[], Any]) -> Frozen:
    """Trace one training step's `forward`. Raises NotFixed, or NothingFrozen, where no block can be passed over."""
    paths = block_paths(model)
    above = set(ancestors(paths[0]))
    trained = _trained(model, above - {paths[0]})
    if id(model.get_submodule(paths[0])) in trained:
        raise NothingFrozen("the first block trains")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise NotFixed("the model normalises over the rows of a batch (BatchNorm)")
    blocks = [model.get_submodule(path) for path in paths]
    trace = Trace(blocks)
    with without_input_gradients(model), trace.watching():
        forward()
    if [index for index, _ in trace.calls] != list(range(len(blocks))):
        raise NotFixed("the model does not call its blocks once each, in order")
    calls = [call for _, call in trace.calls]
    count = 0
    for call in calls:
        if first_tensor(call.output).requires_grad or any(id(m) in trained for m in trace.started[: call.started]):
            break
        count += 1
    if not count:
        raise NothingFrozen("something trains below the first block, or in it")
    calls = calls[:count]
    states = first_tensor(calls[-1].output)
    return Frozen(
        blocks=tuple(blocks[:count]),
        depth=len(blocks),
        modules=tuple(trace.ended[: calls[-1].ended]),
        outputs=tuple(_alone(call.output) for call in calls),
        draws=calls[-1].states != trace.states,
        width=states.shape[-1],
        tokens=states.shape[-2],
        dtype=states.dtype,
    )


@contextlib.contextmanager
def without_input_gradients(model: Any) -> Iterator[None]:
    """For gradient checkpointing transformers makes the embeddings' output require gradients; nothing trains there."""
    asked = bool(getattr(model, "_require_grads_hooks", None))
    if asked:
        model.disable_input_require_grads()
    try:
        yield
    finally:
        if asked:
            model.enable_input_require_grads()


def block_paths(model: nn.Module) -> list[str]:
    """The paths of the model's blocks, from the bottom. NotFixed unless there is one stack of them."""
    sites = [site for site in SiteIndex(model).sites if "block" in site.roles and site.layer is not None]
    stacks = {site.path.rpartition(".")[0] for site in sites}
    if len(stacks) != 1:
        raise NotFixed(f"{type(model).__name__} has {len(stacks) or 'no'} stacks of blocks, and one is needed")
    return [site.path for site in sorted(sites, key=lambda site: site.layer or 0)]


def _trained(model: nn.Module, above: set[str]) -> set[int]:
    """Ids of the modules that hold something trained, up to but without those above the blocks (`above`).

    A piece counts for the module that it sits in; a module above the blocks counts only for parameters of its own.
    """
    found: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            steps = name.split(".")
            owner = ".".join(steps[: steps.index(CHILD)] if CHILD in steps else steps[:-1])
            paths = {owner, *ancestors(owner)} - (above - {owner})
            found |= {id(model.get_submodule(path)) for path in paths}
    return found


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a block's output. NotFixed where it is something else."""
    found = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise NotFixed("the model's blocks do not return hidden states of (rows, tokens, features)")
    return found


def _alone(output: Any) -> Any:
    """The output without its values. NotFixed when there is more in it than one tensor."""
    if isinstance(output, tuple):
        if any(rest is not None and not isinstance(rest, bool | int) for rest in output[1:]):
            raise NotFixed("the model's blocks hand on more than hidden states")
        return (None, *output[1:])
    return None


def random_states() -> tuple[Any, ...]:
    """The states of every generator that a forward pass may draw from, to be compared."""
    numpy: Any = np.random.get_state()  # noqa: NPY002
    devices = [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    return (
        torch.get_rng_state().numpy().tobytes(), *devices, numpy[1].tobytes(), numpy[2], random.getstate(),
    )  # fmt: skip


# -- running a part of the model ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def passing(part: Frozen, states: Tensor) -> Iterator[None]:
    """Within the block, the frozen blocks return `states` without computing anything."""
    before = [block.__dict__.get("forward") for block in part.blocks]
    try:
        for block, output in zip(part.blocks, part.outputs, strict=True):
            block.__dict__["forward"] = functools.partial(_pass, output, states)
        yield
    finally:
        for block, own in zip(part.blocks, before, strict=True):
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = own


def _pass(output: Any, states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return states if output is None else (states, *output[1:])


class _Enough(Exception):
    """The states are computed; what comes after them is not wanted."""


def states_of(part: Frozen, forward: Callable[[], Any]) -> Tensor:
    """The hidden states (rows, tokens, features) that the frozen part computes in `forward`, which is cut short."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Enough(first_tensor(output).detach())

    handle = part.blocks[-1].register_forward_hook(stop)
    try:
        with torch.no_grad():
            forward()
    except _Enough as found:
        return found.args[0]  # type: ignore[no-any-return]
    finally:
        handle.remove()
    raise NotFixed("the model did not call its blocks")
