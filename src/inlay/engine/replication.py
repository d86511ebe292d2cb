"""A deeper model out of a model's own blocks, which share their weights; each takes pieces of its own.

    inlay.replicate_layers(model, [(0, 4), (2, 5)])        # blocks 0 1 2 3 2 3 4 of the base
    inlay.attach(model, inlay.LoRA(r=8))                   # seven places where there were five

A block that comes again is a twin: new modules around the same parameters and buffers, so the bytes stay what they
were. Every block is given its new number, by which it finds its keys and values in a cache, and the config tells the
new depth. `restore_layers` undoes all of it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from inlay.engine.files import CONFIG, read_config
from inlay.engine.host import hosts
from inlay.engine.sites import SiteIndex
from inlay.engine.structure import ancestors, parent
from inlay.engine.walk import modules
from inlay.errors import AdapterError, BaseModelError, CheckpointError, ConfigError, UnsupportedError

LAYERS = "_inlay_layers"
"""Where a model keeps its `Replication`."""
NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""What modules call the number of the block that they are in."""
PEFT_STACK = re.compile(r"(?:model\.)*(?:bert\.)?(?:layers|encoder\.layer|h)")
"""The stacks that HF peft finds."""
ENTRY = "layer_replication"
Ranges = tuple[tuple[int, int], ...]


@dataclasses.dataclass
class Replication:
    """What a model's blocks are, and what they were."""

    ranges: Ranges
    path: str
    """Of the container of the blocks."""
    blocks: dict[str, nn.Module]
    """The container's children, before."""
    fields: list[tuple[Any, str, Any]]
    """What was set: the object (a module, a config), the name, and the value before."""
    by_load: bool = False
    """Whether `load` did it for an adapter; then it is undone when the last adapter goes."""


def replicate_layers(model: nn.Module, ranges: Sequence[Sequence[int]]) -> nn.Module:
    """Make ranges (first, last + 1) of a model's blocks, one after another, its blocks; returns the same model.

    Weights are shared, not copied. Raises AdapterError where adapters are attached, ConfigError for ranges that the
    model does not have, UnsupportedError for models that are not one stack of blocks; then the model is as it was.
    """
    if replicated_layers(model) is not None:
        raise ConfigError(
            f"the layers of this {type(model).__name__} are replicated already: inlay.restore_layers first"
        )
    if next(hosts(model), None) is not None:
        raise AdapterError("replicate_layers needs a model without adapters: call inlay.detach(model) first")
    path, stack = _stack(model)
    wanted = _checked(ranges, len(stack))
    configs = _configs(model, path, len(stack))
    before = list(stack)
    numbered = [_numbered(block, number) for number, block in enumerate(before)]
    order = [number for first, end in wanted for number in range(first, end)]
    used: set[int] = set()
    blocks: dict[str, nn.Module] = {}
    for number in order:
        blocks[str(len(blocks))] = _twin(before[number], {}) if number in used else before[number]
        used.add(number)
    done = Replication(wanted, path, stack._modules, [])  # nothing of the model has changed up to here
    model.__dict__[LAYERS] = done
    stack._modules = blocks
    for place, number in enumerate(order):
        for inside, name in numbered[number]:
            _set(done, blocks[str(place)].get_submodule(inside), name, place)
    for config in configs:
        for name, value in list(vars(config).items()):
            if "layer" in name and isinstance(value, list | tuple) and len(value) == len(before):
                _set(done, config, name, type(value)(value[number] for number in order))
        _set(done, config, "num_hidden_layers", len(order))
    return model


def restore_layers(model: nn.Module) -> nn.Module:
    """Give the model the blocks that it had before `replicate_layers`; returns the same model."""
    done = model.__dict__.get(LAYERS)
    if done is None:
        raise ConfigError(f"the layers of this {type(model).__name__} are not replicated")
    if next(hosts(model), None) is not None:
        raise AdapterError("restore_layers needs a model without adapters: call inlay.detach(model) first")
    model.get_submodule(done.path)._modules = done.blocks
    for one, name, value in reversed(done.fields):
        setattr(one, name, value)
    del model.__dict__[LAYERS]
    return model


def replicated_layers(model: nn.Module) -> list[list[int]] | None:
    """The ranges that a model's blocks are made of, as files have them; None where they are the base's own."""
    done = model.__dict__.get(LAYERS)
    return None if done is None else [list(pair) for pair in done.ranges]


def restore_if_loaded(model: nn.Module) -> None:
    """Undo what `load` did for an adapter, now that the last one is gone."""
    done = model.__dict__.get(LAYERS)
    if done is not None and done.by_load:
        restore_layers(model)


def unshared(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the model in which blocks share no tensors, as a plain deeper model has them."""
    done = model.__dict__.get(LAYERS)
    inside = f"{done.path}." if done is not None else None
    return {name: t.clone() if inside and name.startswith(inside) else t for name, t in tensors.items()}


def settle(model: nn.Module) -> None:
    """Keep the layers for good, now that adapters have been folded into their weights."""
    model.__dict__.pop(LAYERS, None)


# -- for files ---------------------------------------------------------------------------------------------------------


def file_entry(model: nn.Module) -> dict[str, Any]:
    """What the config of an adapter's file says of its base's layers: HF peft's entry of LoRA."""
    layers = replicated_layers(model)
    return {} if layers is None else {ENTRY: layers}


def peft_replicates(model: nn.Module, peft_type: str) -> bool:
    """Whether HF peft has an adapter of this type on the layers that the model has."""
    done = model.__dict__.get(LAYERS)
    return done is None or (peft_type == "LORA" and PEFT_STACK.fullmatch(done.path) is not None)


@contextlib.contextmanager
def as_in(folder: Path, model: nn.Module) -> Iterator[None]:
    """Give the model the layers that the adapter in a folder was made for; if what follows fails, take them away again.

    Raises BaseModelError where the model has other replicated layers, or adapters that sit in its own.
    """
    wanted, here = read_config(folder).get(ENTRY), replicated_layers(model)
    if not wanted or wanted == here:
        yield
        return
    if here is not None or next(hosts(model), None) is not None:
        what = f"its layers are {here}" if here is not None else "adapters sit in its own layers"
        raise BaseModelError(f"{folder} was made for {ENTRY}={wanted}, and of the model here {what}: detach, then load")
    try:
        replicate_layers(model, wanted)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG} has {ENTRY}={wanted!r}, which does not fit: {error}") from error
    model.__dict__[LAYERS].by_load = True
    try:
        yield
    except BaseException:
        restore_if_loaded(model)
        raise


# -- inside ------------------------------------------------------------------------------------------------------------


def _stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    paths = [site.path for site in SiteIndex(model).sites if "block" in site.roles and site.parameter is None]
    found = list(dict.fromkeys(map(parent, paths)))
    stack = model.get_submodule(found[0]) if len(found) == 1 else None
    if not isinstance(stack, nn.ModuleList) or len(stack) != len(paths):
        what = f"several stacks of blocks ({', '.join(found)})" if len(found) > 1 else "no nn.ModuleList of blocks"
        raise UnsupportedError(f"{type(model).__name__} cannot have its layers replicated: it has {what}")
    return found[0], stack


def _checked(ranges: Sequence[Sequence[int]], depth: int) -> Ranges:
    """The ranges as pairs. ConfigError for what is none in a model of this depth."""

    def fits(pair: Any) -> bool:
        whole = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(number) is int for number in pair)
        return whole and 0 <= pair[0] < pair[1] <= depth

    if not isinstance(ranges, list | tuple) or not ranges or not all(map(fits, ranges)):
        raise ConfigError(
            f"replicate_layers(ranges={ranges!r}): pairs (first, last + 1) of the {depth} layers from 0 to {depth - 1} "
            f"are needed, such as [(0, {depth}), (0, {depth})]"
        )
    return tuple((pair[0], pair[1]) for pair in ranges)


def _configs(model: nn.Module, path: str, depth: int) -> list[Any]:
    """The configs above the blocks, each once. UnsupportedError for what a depth of its own would make wrong."""
    above: list[Any] = [getattr(model.get_submodule(place), "config", None) for place in ancestors(path)]
    found = {id(config): config for config in above if hasattr(config, "num_hidden_layers")}
    for config in found.values():
        if config.num_hidden_layers != depth:
            raise UnsupportedError(
                f"{type(model).__name__} cannot have its layers replicated: its config says {config.num_hidden_layers} "
                f"of them, and there are {depth}"
            )
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise UnsupportedError(
                f"{type(model).__name__} cannot have its layers replicated: scale_attn_by_inverse_layer_idx makes what "
                "they compute depend on their number"
            )
    return list(found.values())


def _numbered(block: nn.Module, number: int) -> list[tuple[str, str]]:
    """(path inside, name) of each place that keeps the block's number."""
    kept = ((path, name, m.__dict__.get(name)) for path, m in modules(block) for name in NUMBERS)
    return [(path, name) for path, name, value in kept if type(value) is int and value == number]


def _set(done: Replication, one: Any, name: str, value: Any) -> None:
    done.fields.append((one, name, getattr(one, name)))
    setattr(one, name, value)


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """New modules around the same parameters, buffers and everything else."""
    if id(module) in made:
        return made[id(module)]
    if "forward" in module.__dict__:
        raise UnsupportedError(
            f"layers cannot be replicated once something replaced the forward of {type(module).__name__}, as device "
            "maps do: load the model on one device"
        )
    new = made[id(module)] = module.__new__(type(module))
    own = {n: copy.copy(v) if isinstance(v, dict | set | list) else v for n, v in module.__dict__.items()}
    below = {n: None if m is None else _twin(m, made) for n, m in module._modules.items()}
    new.__dict__.update(own | {"_modules": below})
    return new
