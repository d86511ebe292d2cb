"""`train.activation_budget`: what a step keeps for its backward pass is made to fit a number of bytes.

The first batch is profiled (`saved.py`): which bytes each block, and each part of one, keeps, and what computing it
again would cost. Units are then treated, the best first by

    bytes no longer kept / FLOPs of doing without them

until what is kept fits. There is a table of mechanisms: computing a unit again in the backward pass
(`torch.utils.checkpoint`, not reentrant, with the same random numbers); on GPUs, moving what it keeps to the host; and,
for the blocks of a reversible stack (MEFT), inverting the whole stack, which is such a unit. Loss and gradients stay
what they were (an inverted stack's gradients to the tolerance of its method). The budget is for what is held when the
forward ends; while a unit's backward runs, that unit is held in full beside what is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from inlay.engine.sites import SiteIndex
from inlay.errors import ConfigError
from inlay.pieces.reversible.reconstruction import kept as keeping
from inlay.pieces.reversible.reconstruction import running
from inlay.pieces.reversible.stack import ReversibleStack
from inlay.train.around import Around, Forward
from inlay.train.options import readable
from inlay.train.saved import Profile, Storages, Unit, profile
from inlay.train.trainer import untouched_random_states

if TYPE_CHECKING:
    from inlay.train.trainer import Trainer

Call = Callable[..., Any]


@dataclasses.dataclass(kw_only=True)
class StackUnit(Unit):
    """The blocks of a reversible stack, from the beginning of the first to the end of the last."""

    stack: ReversibleStack
    streams: int = 0
    """Bytes that an inverted pass keeps beside what the first block is given."""


class Mechanism(Protocol):
    """A way of not keeping what a unit would keep."""

    verb: str
    """What happens to the unit, for the report."""

    def takes(self, unit: Unit) -> bool:
        """Whether it can be used on such a unit."""

    def available(self, device: torch.device) -> bool:
        """Whether it can be used there."""

    def kept(self, unit: Unit) -> Storages:
        """What stays on the device for a unit treated so."""

    def cost(self, unit: Unit, saved: int) -> float:
        """FLOPs, or their worth in time, that treating the unit costs; `saved` are the bytes it frees."""

    def treat(self, unit: Unit, forward: Call) -> Call:
        """The unit's forward, treated."""


class Recompute:
    """Keep a unit's inputs alone, and compute the rest again in the backward pass."""

    verb = "recomputed"

    def takes(self, unit: Unit) -> bool:
        """Any module."""
        return not isinstance(unit, StackUnit)

    def available(self, device: torch.device) -> bool:
        """Anywhere."""
        return True

    def kept(self, unit: Unit) -> Storages:
        """The inputs."""
        return unit.inputs

    def cost(self, unit: Unit, saved: int) -> float:
        """One more forward of the unit."""
        return float(unit.flops)

    def treat(self, unit: Unit, forward: Call) -> Call:
        """Checkpointed where gradients are wanted."""

        def recomputed(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return recomputed


class Offload:
    """Move what a unit keeps to the host's memory in the forward pass, and back for the backward pass."""

    verb = "offloaded"
    flops_a_byte = 8000.0
    """What a GPU computes (200 TFLOP/s) while a byte goes to the host and back (25 GB/s each way)."""

    def takes(self, unit: Unit) -> bool:
        """Any module."""
        return not isinstance(unit, StackUnit)

    def available(self, device: torch.device) -> bool:
        """On GPUs; elsewhere there is nowhere to move to."""
        return device.type == "cuda"

    def kept(self, unit: Unit) -> Storages:
        """Nothing."""
        return {}

    def cost(self, unit: Unit, saved: int) -> float:
        """The time of both copies, in FLOPs."""
        return saved * self.flops_a_byte

    def treat(self, unit: Unit, forward: Call) -> Call:
        """With hooks that copy everything but parameters and buffers."""
        own = {tensor.untyped_storage().data_ptr() for tensor in (*unit.module.parameters(), *unit.module.buffers())}

        def offloaded(*args: Any, **kwargs: Any) -> Any:
            copies: dict[Any, tuple[torch.device, Tensor, Any]] = {}

            def pack(tensor: Tensor) -> Any:
                storage = tensor.untyped_storage()
                if storage.data_ptr() in own:
                    return tensor
                # Several operations keep one tensor, and one copy serves them all. The weak reference, held with the
                # copy, keeps the identity from being given to another storage once this one is freed.
                ref: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                place = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
                key = (ref.cdata, tensor._version, *place)
                if key not in copies:
                    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                    copies[key] = (tensor.device, host.copy_(tensor, non_blocking=tensor.is_cuda), ref)
                return copies[key]

            def unpack(packed: Any) -> Tensor:
                return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=True)

            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return forward(*args, **kwargs)

        return offloaded


class Invert:
    """Keep a reversible stack's streams between its segments alone, and find the others again from these."""

    verb = "inverted"

    def takes(self, unit: Unit) -> bool:
        """A reversible stack."""
        return isinstance(unit, StackUnit)

    def available(self, device: torch.device) -> bool:
        """Anywhere."""
        return True

    def kept(self, unit: Unit) -> Storages:
        """What the first block is given, and the streams."""
        assert isinstance(unit, StackUnit)
        return {**unit.inputs, -id(unit): unit.streams}

    def cost(self, unit: Unit, saved: int) -> float:
        """One more forward of every block."""
        return float(unit.flops)

    def treat(self, unit: Unit, forward: Call) -> Call:
        """The first block's forward, with which a pass begins that is inverted."""
        assert isinstance(unit, StackUnit)
        stack = unit.stack

        def inverted(*args: Any, **kwargs: Any) -> Any:
            with stack.inverting(True):
                return forward(*args, **kwargs)

        return inverted


MECHANISMS: dict[str, Mechanism] = {"recompute": Recompute(), "offload": Offload(), "invert": Invert()}
"""All that there are; a further one is one more entry."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which units are treated, by which mechanism, and what a step then keeps."""

    treated: Mapping[str, tuple[Unit, Mechanism]]
    before: int
    kept: int

    def __str__(self) -> str:
        counts: dict[str, list[str]] = {}
        for path, (_, mechanism) in self.treated.items():
            counts.setdefault(mechanism.verb, []).append(path)
        did = "; ".join(f"{len(paths)} modules {verb} ({_shown(paths)})" for verb, paths in counts.items())
        return f"{readable(self.before)} kept by a step become {readable(self.kept)}: {did or 'nothing to do'}"

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the units' forwards are treated."""
        before = {path: unit.module.__dict__.get("forward") for path, (unit, _) in self.treated.items()}
        try:
            for unit, mechanism in self.treated.values():
                unit.module.__dict__["forward"] = mechanism.treat(unit, unit.module.forward)
            yield
        finally:
            for path, own in before.items():
                vars(self.treated[path][0].module).pop("forward", None)
                if own is not None:
                    vars(self.treated[path][0].module)["forward"] = own


def _shown(paths: Sequence[str]) -> str:
    return ", ".join(paths) if len(paths) <= 4 else f"{', '.join(paths[:2])}, …, {paths[-1]}"


def plan(found: Profile, budget: int, mechanisms: Sequence[Mechanism]) -> Plan:
    """Greedily the cheapest treatment that keeps at most `budget` bytes. ConfigError, with the least, if none does."""
    total, least = found.total, found.total
    options: list[tuple[float, Unit, Mechanism]] = []
    for unit in found.units:
        for mechanism in (one for one in mechanisms if one.takes(unit)):
            saved = total - found.kept({unit.path: mechanism.kept(unit)})
            if saved > 0:
                options.append((saved / max(mechanism.cost(unit, saved), 1.0), unit, mechanism))
    options.sort(key=lambda option: (-option[0], option[1].path))
    treated: dict[str, tuple[Unit, Mechanism]] = {}
    storages: dict[str, Storages] = {}
    kept = total
    for _, unit, mechanism in options:
        if kept <= budget:
            break
        if any(unit.path.startswith(f"{path}.") for path in treated):
            continue
        inside = [path for path in treated if f"{path}.".startswith(f"{unit.path}.")]  # itself too, treated otherwise
        changed = {path: held for path, held in storages.items() if path not in inside}
        changed[unit.path] = mechanism.kept(unit)
        if (then := found.kept(changed)) >= kept:
            continue
        for path in inside:
            del treated[path]
        treated[unit.path], storages, kept = (unit, mechanism), changed, then
        least = min(least, kept)
    if kept > budget:
        raise ConfigError(
            f"train.activation_budget={readable(budget)} cannot be met: a step keeps at least {readable(least)} "
            f"(of {readable(total)}) with every block treated; raise it, or lower train.per_device_train_batch_size or "
            "max_length"
        )
    return Plan(treated, total, kept)


def units_of(model: nn.Module) -> list[Unit]:
    """The blocks of a model and the modules right below them; in place of the blocks of a reversible stack, the stack.

    ConfigError where there are no blocks.
    """
    blocks = [s.path for s in SiteIndex(model).sites if "block" in s.roles and s.layer is not None]
    if not blocks:
        raise ConfigError(f"train.activation_budget cannot be used: {type(model).__name__} has no repeated blocks")
    stacks = {found.name: found for found in running(model)}  # of several active adapters, the last one couples
    inverted = {id(block) for found in stacks.values() for block in found.blocks}
    units: list[Unit] = [
        StackUnit(name, found.blocks[0], last=found.blocks[-1], stack=found.stack) for name, found in stacks.items()
    ]
    for path in blocks:
        block = model.get_submodule(path)
        if id(block) in inverted:
            continue
        units.append(Unit(path, block))
        parts = [(name, part) for name, part in block.named_children() if any(True for _ in part.parameters())]
        units += [Unit(f"{path}.{name}", part) for name, part in parts if name != "inlays"]
    return units


def measured(model: nn.Module, units: Sequence[Unit], forward: Callable[[], Any]) -> Profile:
    """`profile` of a pass that keeps everything; reversible stacks are measured in a second pass, inverted."""
    with keeping(model):
        found = profile(model, units, forward)
    stacks = [unit for unit in found.units if isinstance(unit, StackUnit)]
    twins = [Unit(unit.path, unit.module, last=unit.last) for unit in stacks]
    held = profile(model, twins, forward).held if stacks else ()
    for unit, twin in zip(stacks, twins, strict=True):
        inside = {key: size for key, size, within in held if unit.path in within and key not in twin.inputs}
        unit.streams = sum(inside.values())
    return found


class ActivationBudget(Around):
    """Plans on the first batch, and again when a larger one comes; `say` gets one line for each plan."""

    def __init__(self, budget: int, say: Callable[[str], None]) -> None:
        self.budget, self.say = budget, say
        self.plan: Plan | None = None
        self.size = 0
        """Numbers in the inputs of the batch that the plan is for."""

    def __call__(self, trainer: Trainer, forward: Forward, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The same loss and gradients, with less kept."""
        size = sum(value.numel() for value in inputs.values() if isinstance(value, Tensor))
        if self.plan is None or size > self.size:
            self._make(trainer, functools.partial(forward, inputs))
            self.size = size
        assert self.plan is not None
        with keeping(trainer.adapted), self.plan.applied():
            return forward(inputs)

    def _make(self, trainer: Trainer, forward: Callable[[], Any]) -> None:
        if trainer.args.gradient_checkpointing:
            raise ConfigError(
                "train.activation_budget and train.gradient_checkpointing are two ways to the same end: keep one"
            )
        device = trainer.args.device
        usable = [mechanism for mechanism in MECHANISMS.values() if mechanism.available(device)]
        with untouched_random_states():
            found = measured(trainer.adapted, units_of(trainer.adapted), forward)
        before = None if self.plan is None else set(self.plan.treated)
        self.plan = plan(found, self.budget, usable)
        if before != set(self.plan.treated):
            self.say(f"activation_budget {readable(self.budget)}: {self.plan}")
