"""The adapters of one model and their three states: loaded, active, trainable.

Loaded: the pieces sit in the model (`attach`, `load`, `detach`). Active: they run, in the order of activation, the
first innermost, or as a composition says (`activate`, `using`, `disabled`). Trainable: their parameters require
gradients (`trainable`). Each state changes by its own verb and never as a side effect of another; `train()` and
`eval()` change none of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from inlay.engine.bank import Bank

from inlay.engine.composition import Bound, Composition, names_in
from inlay.engine.controller import Controller
from inlay.engine.four_bit import hold_codes, let_go, refuse_packed
from inlay.engine.host import RESERVED, State, close_host, hosts, inlays_of, open_host, refresh_class
from inlay.engine.merging import fold, merged_parameters, swap
from inlay.engine.piece import Method, Piece
from inlay.engine.replication import restore_if_loaded, settle
from inlay.engine.roles import new_heads
from inlay.engine.sites import Site, SiteIndex, is_conv1d
from inlay.engine.trained_copy import ModulesToSave
from inlay.engine.walk import modules
from inlay.errors import AdapterError, ConfigError, did_you_mean

ATTRIBUTE = "_inlay"
"""Where a model keeps its `Adapters`: a plain attribute, so that it is copied and pickled with the model."""

Placed = list[tuple[Site, Piece]]


@dataclasses.dataclass
class Adapter:
    """One loaded adapter: its methods, and for each method the pieces that it put into the model."""

    name: str
    methods: tuple[Method, ...]
    placed: list[Placed]
    controllers: list[Controller]

    def pieces(self) -> Iterator[tuple[Site, Piece]]:
        """Every (site, piece) of every method."""
        for placed in self.placed:
            yield from placed

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, each once."""
        found = (p for _, piece in self.pieces() for module in piece.modules() for p in module._parameters.values())
        return list({id(parameter): parameter for parameter in found if parameter is not None}.values())


class Adapters:
    """All adapters of one model, the state its hosts share, and what the model was before."""

    def __init__(self, model: nn.Module) -> None:
        self.state = State()
        self.loaded: dict[str, Adapter] = {}
        self.required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.originals: dict[str, dict[str, nn.Parameter | None]] = {}
        """While merged: by host path, the base's own parameters, to be put back by `unmerge`."""
        self.banks: dict[tuple[str, ...], Bank] = {}
        """Adapters that shared a call, by their names; forgotten when what is loaded changes."""
        self.fused: list[nn.Module] = []
        """Modules that hold a fused piece."""

    def forget_banks(self) -> None:
        """What several adapters computed together no longer fits; a switchable model goes back to `active`."""
        self.banks.clear()
        self.state.bank = None

    def get(self, name: str) -> Adapter:
        """The adapter `name`; AdapterError when it is not loaded."""
        if name not in self.loaded:
            have = ", ".join(map(repr, self.loaded)) or "none"
            raise AdapterError(f"no adapter {name!r} is loaded (loaded: {have}){did_you_mean(name, self.loaded)}")
        return self.loaded[name]

    def active_pieces(self) -> Placed:
        """Every (site, piece) of the active adapters, in the order of activation."""
        return [placed for name in names_in(self.state.active) for placed in self.loaded[name].pieces()]


def find_adapters(model: nn.Module) -> Adapters | None:
    """The model's adapters, or None when nothing is attached; sees through wrappers such as DistributedDataParallel."""
    found = base_model(model).__dict__.get(ATTRIBUTE)
    return found if isinstance(found, Adapters) else None


def adapters_of(model: nn.Module) -> Adapters:
    """The model's adapters; AdapterError when nothing is attached."""
    found = find_adapters(model)
    if found is None:
        raise AdapterError(f"nothing is attached to this {type(model).__name__}: call inlay.attach or inlay.load first")
    return found


def base_model(model: nn.Module) -> nn.Module:
    """The module that the adapters were attached to, inside any wrapper; the model itself when nothing is attached."""
    return next((m for _, m in modules(model) if isinstance(m.__dict__.get(ATTRIBUTE), Adapters)), model)


# -- loaded ------------------------------------------------------------------------------------------------------------


def attach(
    model: nn.Module,
    methods: Method | Sequence[Method],
    name: str = "default",
    *,
    modules_to_save: Sequence[str] | None = None,
) -> nn.Module:
    """Set the pieces of `methods` into `model`, in place, as one adapter; returns the same model.

    The base is frozen and its bits are never written. The new adapter is trainable, and active on top of those that
    already are. Heads that a task class put on the pretrained trunk (`classifier`, `score`, …) are trained and saved
    with it unless `modules_to_save` says otherwise (`[]`: none; names: exactly these modules).

    Raises TargetError when a target matches nothing, AdapterError when the name is taken, ConfigError for a name or a
    field that cannot be used; then the model is as it was.
    """
    model = base_model(model)
    refuse_packed(model)
    set_in(SiteIndex(model), methods, name, modules_to_save)
    return model


def set_in(
    index: SiteIndex, methods: Method | Sequence[Method], name: str, modules_to_save: Sequence[str] | None
) -> Adapter:
    """`attach`, with the places of the base model found already; returns the new adapter."""
    adapters = find_adapters(index.model) or Adapters(index.model)
    check_name(name, adapters)
    adapter = make(index, methods, name, modules_to_save)
    _insert(index.model, adapters, adapter)
    return adapter


def make(
    index: SiteIndex, methods: Method | Sequence[Method], name: str, modules_to_save: Sequence[str] | None
) -> Adapter:
    """The adapter that `attach` would set in, outside the model."""
    model = index.model
    methods = [methods] if isinstance(methods, Method) else list(methods)
    if not methods:
        raise ConfigError("attach was given no method: pass one, such as inlay.LoRA(r=8), or a list of them")
    methods = [part for method in methods for part in method.parts(index)]
    sites = [method.sites(index) for method in methods]
    placed = [method.build(model, found) for method, found in zip(methods, sites, strict=True)]
    _refuse_overlap(methods, placed)
    saved = ModulesToSave(modules=tuple(_heads(model, placed) if modules_to_save is None else modules_to_save))
    taken = {site.name for one in placed for site, piece in one if piece.replaces}
    heads = [site for site in saved.sites(index) if site.name not in taken]
    if heads:
        methods.append(saved)
        placed.append(saved.build(model, heads))
    adapter = Adapter(name, tuple(methods), placed, [])
    if not any(True for _, piece in adapter.pieces() for _ in piece.parameters()):
        names = ", ".join(type(method).__name__ for method in methods)
        raise ConfigError(f"{names} has nothing to train in {type(model).__name__}")
    return adapter


def check_name(name: str, adapters: Adapters) -> None:
    """Refuse names that cannot be folder and module names, names in use, and any attaching while merged."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in RESERVED:
        raise ConfigError(f"{name!r} cannot name an adapter: use letters, digits, '_' and '-', as in 'law-2'")
    if name in adapters.loaded:
        raise AdapterError(f"an adapter {name!r} is loaded already: choose another name, or detach it first")
    if adapters.state.merged:
        raise AdapterError(f"adapters {list(adapters.state.merged)} are merged: call inlay.unmerge(model) first")


def _refuse_overlap(methods: Sequence[Method], placed: Sequence[Placed]) -> None:
    """Two trained copies of one parameter: only the outer one would be read, and the other would never learn."""
    owners: dict[str, Method] = {}
    for method, one in zip(methods, placed, strict=True):
        for site, piece in one:
            if piece.replaces and owners.setdefault(site.name, method) is not method:
                raise ConfigError(
                    f"{type(owners[site.name]).__name__} and {type(method).__name__} would both train a copy of "
                    f"{site.name}: leave it out of one of them with exclude=..."
                )


def _heads(model: nn.Module, placed: Sequence[Placed]) -> list[str]:
    """New heads, except those that a method was told to adapt in another way."""
    adapted = {site.path for one in placed for site, piece in one if not piece.replaces}
    return [head for head in new_heads(model) if not any(f"{path}.".startswith(f"{head}.") for path in adapted)]


def _insert(model: nn.Module, adapters: Adapters, adapter: Adapter) -> None:
    model.__dict__.setdefault(ATTRIBUTE, adapters)
    if not adapters.loaded:
        model.requires_grad_(False)
    hold_codes(model, training=True)
    for method, placed in zip(adapter.methods, adapter.placed, strict=True):
        keyed: dict[str, Piece] = {}
        for site, piece in placed:
            inlays = open_host(site.module, adapters.state, is_conv1d(site.module))
            inlays.insert(adapter.name, method.kind, piece, site.parameter)
            shelf, training = inlays.get_submodule(adapter.name), site.module.training
            if any(module.training != training for module in shelf.modules()):
                shelf.train(training)
            keyed[site.name] = piece
        controller = method.controller(keyed)
        if controller is not None:
            adapter.controllers.append(controller)
    for site, _ in adapter.pieces():
        if site.parameter is not None:
            refresh_class(site.module)
    adapters.loaded[adapter.name] = adapter
    adapters.forget_banks()
    adapters.state.active = (*adapters.state.active, adapter.name)
    for method, placed in zip(adapter.methods, adapter.placed, strict=True):
        method.on_attach(model, placed)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take one adapter (default: all) out. With the last one gone, the model is as it was before the first `attach`:
    classes, state-dict keys, `requires_grad` and bits. A merged model is unmerged first.
    """
    adapters = adapters_of(model)
    model = base_model(model)
    names = list(adapters.loaded) if name is None else [adapters.get(name).name]
    for part in adapters.state.active:
        if isinstance(part, Bound) and name in part.names and len(adapters.loaded) > 1:
            raise AdapterError(f"adapter {name!r} is part of {part.of}: activate something else first")
    unmerge(model)
    adapters.forget_banks()
    for one in names:
        adapter = adapters.loaded.pop(one)
        adapters.state.active = tuple(a for a in adapters.state.active if one not in names_in((a,)))
        for method, placed in zip(adapter.methods, adapter.placed, strict=True):
            method.on_detach(model, placed)
        for site, _ in adapter.pieces():
            inlays = inlays_of(site.module)
            if inlays is None:
                continue
            inlays.remove(one)
            if inlays.empty:
                close_host(site.module)
            else:
                refresh_class(site.module)
    if not adapters.loaded:
        for _, module, _ in [*hosts(model)]:  # what is left are fused and packed ones
            close_host(module)
        del model.__dict__[ATTRIBUTE]
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(adapters.required_grad.get(parameter_name, parameter.requires_grad))
        restore_if_loaded(model)
        let_go(model)
    return model


# -- active ------------------------------------------------------------------------------------------------------------


def activate(model: nn.Module, *names: str | Composition | Bound) -> None:
    """Make exactly these adapters active, the first innermost; with no name, none: the base model.

    Beside names, compositions: `activate(model, "law", Parallel("a", "b"))`; see docs/combining.md.
    """
    adapters = adapters_of(model)
    wanted: list[str | Bound] = []
    for one in names:
        wanted += one.bind(adapters) if isinstance(one, Composition | Bound) else (adapters.get(one).name,)
    parts, running = tuple(wanted), names_in(tuple(wanted))
    if sum(len(set(names_in((part,)))) for part in parts) != len(set(running)):
        raise AdapterError(f"activate was given an adapter twice: {list(running)}")
    if adapters.state.merged and parts != adapters.state.active:
        raise AdapterError(f"adapters {list(adapters.state.merged)} are merged: call inlay.unmerge(model) first")
    if adapters.state.bank is not None:
        if running != parts:
            raise AdapterError(
                "a composition does not run while several adapters share this model's calls: leave per_row, or "
                "switchable(model, False), first"
            )
        adapters.state.bank.weigh(dict.fromkeys(running, 1.0))
    for part in parts:
        if isinstance(part, Bound):
            part.start(base_model(model), parts)
    adapters.state.active = parts


@contextlib.contextmanager
def using(model: nn.Module, *names: str | Composition | Bound) -> Iterator[nn.Module]:
    """Within the block, exactly these adapters are active; afterwards, those that were (if still loaded)."""
    before = adapters_of(model).state.active
    activate(model, *names)
    try:
        yield model
    finally:
        left = find_adapters(model)
        if left is not None:
            activate(model, *(part for part in before if set(names_in((part,))) <= left.loaded.keys()))


def disabled(model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
    """Within the block no adapter is active: outputs are the base's, bit for bit. What is trainable stays so."""
    return using(model)


def active(model: nn.Module) -> tuple[str | Composition, ...]:
    """The active adapters, and compositions of them, in order."""
    return tuple(part if isinstance(part, str) else part.of for part in adapters_of(model).state.active)


# -- trainable ---------------------------------------------------------------------------------------------------------


def trainable(model: nn.Module, *names: str) -> None:
    """Make exactly these adapters trainable, and no other; with no name, none."""
    adapters = adapters_of(model)
    if names:
        refuse_packed(base_model(model))
    wanted = {id(p) for name in names for p in adapters.get(name).parameters()}
    for adapter in adapters.loaded.values():
        for parameter in adapter.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
    hold_codes(base_model(model), training=bool(wanted))


def settle_training(model: nn.Module, adapter: Adapter, train: bool) -> None:
    """Leave a loaded adapter trainable, or freeze it. UnsupportedError where nothing can be trained any more."""
    if train:
        refuse_packed(base_model(model))
        return
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    left = any(
        parameter.requires_grad for each in adapters_of(model).loaded.values() for parameter in each.parameters()
    )
    hold_codes(base_model(model), training=left)


def controllers(model: nn.Module) -> list[Controller]:
    """The controllers of the active adapters, for a training loop to call."""
    adapters = adapters_of(model)
    names = dict.fromkeys(names_in(adapters.state.active))
    return [controller for name in names for controller in adapters.loaded[name].controllers]


# -- merged ------------------------------------------------------------------------------------------------------------


def merge(model: nn.Module, *, keep_base: bool = True) -> nn.Module:
    """Fold the active adapters into the weights; outputs stay the same (to rounding) and cost what the base costs.

    The base's own parameters are kept aside, so `unmerge` restores the very bits. With `keep_base=False` they are
    written over, which takes no memory, and every adapter is detached: the model is a plain one with new weights.

    Raises UnsupportedError, before anything is changed, when an active adapter holds a piece that is not a change of
    the weights.
    """
    adapters = adapters_of(model)
    if adapters.state.bank is not None:
        raise AdapterError(
            "several adapters share this model's calls: leave per_row, or switchable(model, False), first"
        )
    if not keep_base:
        unmerge(model)
        fold(base_model(model), adapters, merged_parameters(adapters))
        settle(base_model(model))
        detach(model)
    elif not adapters.state.merged:
        swap(adapters, merged_parameters(adapters))
        adapters.state.merged = names_in(adapters.state.active)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put back the parameters that `merge` set aside: the same tensors, so the same bits."""
    adapters = adapters_of(model)
    for site, _ in adapters.active_pieces():
        site.module._parameters.update(adapters.originals.pop(site.path, {}))
    adapters.state.merged = ()
    return model
