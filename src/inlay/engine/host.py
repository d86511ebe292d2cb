"""The host: a module of the user's model whose class was specialised in place so that pieces can sit in it.

`nn.Linear` becomes a subclass of `nn.Linear` (built once per base class, generic, never per architecture) with the same
name and one more child, `inlays`. Its `forward` is an onion of the active pieces around the base's own `forward`; its
adapted parameters read as the pieces' `weight(W)`. Nothing else changes: isinstance, hooks, the path and the bits of
every parameter, and the base's state-dict keys stay as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from inlay.engine import sequential
from inlay.engine.linear import Linear, plain_linear
from inlay.engine.piece import Piece

if TYPE_CHECKING:
    from inlay.engine.bank import Bank
    from inlay.engine.composition import Bound

CHILD = "inlays"
"""The name of the child that holds a host's pieces: `host.inlays.<adapter>.<piece>`."""

FUSED = "fused"
"""The shelf of the pieces that compute in another way what the adapters' pieces do (`engine/fused.py`)."""


class State:
    """What all hosts of one model share: which adapters are active, in the order of composition, and which merged.

    Switching replaces one tuple here; hosts notice by identity at their next call.
    """

    def __init__(self) -> None:
        self.active: tuple[str | Bound, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.bank: Bank | None = None
        """While several adapters share each call: who decides, instead of `active`, what runs where."""

    @property
    def running(self) -> tuple[str | Bound, ...] | Bank:
        """The adapters whose pieces run: those active, unless their effect is in the weights already."""
        if self.merged:
            return ()
        return self.active if self.bank is None else self.bank


class FewRows(Protocol):
    """Called with the host in the place of the base's own `forward`: faster where x has few rows."""

    most_rows: int

    def __call__(self, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The base's output."""


class Inner:
    """What a piece receives as `inner`: the rest of the onion, callable, with the weight that it amounts to."""

    def __init__(self, inlays: Inlays, base: Callable[..., Any], piece: Piece | None, inner: Inner | None) -> None:
        self.inlays = inlays
        self.base = base  # a plain function of the host: bound methods made on the fly cannot be traced
        self.piece = piece
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of this part of the onion."""
        if self.piece is None:
            if self.inlays.own_forward is not None:
                return self.inlays.own_forward(*args, **kwargs)
            return self.base(self.inlays.host, *args, **kwargs)
        return self.piece(self.inner, *args, **kwargs)

    def linear(self) -> Linear | None:
        """This part of the onion as a linear, when it is nothing else: a kernel may compute it along with more."""
        if self.piece is not None or self.inlays.own_forward is not None:
            return None
        return plain_linear(self.inlays)

    @property
    def module(self) -> nn.Module:
        """The host: what the base module knows of itself (strides, padding, sizes)."""
        return self.inlays.host

    @property
    def plain(self) -> bool:
        """True when nothing lies between the piece and the base module."""
        return self.piece is None

    def weight(self) -> Tensor:
        """The weight that this part of the onion amounts to, (out, in) for linears. Raises where there is none."""
        if self.piece is None or self.inner is None:
            weight: Tensor = self.inlays.value("weight", self.inlays.original("weight"))
            return weight.T if self.inlays.transposed else weight
        return self.piece.weight(self.inner.weight())

    def bias(self) -> Tensor | None:
        """The bias that this part of the onion amounts to."""
        if self.piece is None or self.inner is None:
            return self.inlays.bias_value()
        return self.piece.bias(self.inner.bias())


class Layers(NamedTuple):
    """The running pieces of one host."""

    onion: Inner
    """Those around its call, with the base innermost."""
    values: dict[str, tuple[Piece, ...]]
    """Those that stand for its parameters, by the parameter's name."""
    computed: tuple[str, ...]
    """The parameters whose value is computed, not merely stored."""


class Inlays(nn.Module):
    """The pieces of one host: `inlays.<adapter>` is a ModuleDict of pieces, whichever adapter is active."""

    host: nn.Module
    _seen: tuple[str | Bound, ...] | Bank | None
    _formed: Layers | None

    def __init__(self, host: nn.Module, state: State, transposed: bool) -> None:
        super().__init__()
        self.state = state
        self.transposed = transposed
        self.own_forward: Callable[..., Any] | None = host.__dict__.pop("forward", None)
        """A `forward` that somebody set on the instance (accelerate's device hooks do): it stays the innermost call."""
        self.held: dict[str, Tensor] | None = None
        self.few_rows: FewRows | None = None
        self._forget()
        object.__setattr__(self, "host", host)  # not as a child: the host is above

    # -- contents ------------------------------------------------------------------------------------------------------

    def insert(self, adapter: str, key: str, piece: Piece, parameter: str | None) -> str:
        """Add a piece; returns the key it got (made unique within the adapter)."""
        if adapter not in self._modules:
            self.add_module(adapter, nn.ModuleDict())
        shelf = self._modules[adapter]
        assert isinstance(shelf, nn.ModuleDict)
        key = f"{key}_{parameter}" if parameter is not None else key
        unique, count = key, 1
        while unique in shelf:
            unique, count = f"{key}_{count}", count + 1
        piece.parameter = parameter
        shelf[unique] = piece
        self._forget()
        return unique

    def remove(self, adapter: str) -> None:
        """Take out every piece of one adapter."""
        if adapter in self._modules:
            del self._modules[adapter]
        self._forget()

    def take_few_rows(self, function: FewRows | None) -> None:
        """From now on the base is called through this function; None: as it is."""
        self.few_rows = function
        self._forget()

    @property
    def empty(self) -> bool:
        """Whether there is no reason any more to be a host."""
        return not self._modules and self.few_rows is None

    def pieces(self, adapters: tuple[str | Bound, ...], parameter: str | None) -> Iterator[Piece]:
        """The pieces of these adapters, in order, that act on `parameter` (None: on the module's call)."""
        for adapter in adapters:
            if not isinstance(adapter, str):
                yield from adapter.pieces(self, parameter)
                continue
            shelf = self._modules.get(adapter)
            if shelf is not None:
                for piece in shelf.children():
                    if isinstance(piece, Piece) and piece.parameter == parameter:
                        yield piece

    def all_pieces(self, adapter: str) -> Iterator[Piece]:
        """The pieces of one adapter, on the call and on parameters."""
        shelf = self._modules.get(adapter)
        return (piece for piece in shelf.children() if isinstance(piece, Piece)) if shelf is not None else iter(())

    def parameters_touched(self) -> frozenset[str]:
        """Names of the host's parameters that some loaded piece, active or not, stands for."""
        shelves = [shelf for shelf in self._modules.values() if shelf is not None]
        touched = (piece.parameter for shelf in shelves for piece in shelf.children() if isinstance(piece, Piece))
        return frozenset(name for name in touched if name is not None)

    # -- what the host asks at each call -------------------------------------------------------------------------------

    def call(self) -> Inner:
        """The onion of the running pieces, rebuilt only when the set of active adapters has changed."""
        return self._layers().onion

    def value(self, name: str, original: Tensor) -> Tensor:
        """What the host's parameter `name` reads as while the active pieces stand for it."""
        if self.held is not None and name in self.held:
            return self.held[name]
        value = original
        for piece in self._layers().values.get(name, ()):
            value = piece.weight(value)
        return value.to(original.dtype)

    def original(self, name: str) -> Tensor:
        """The base's own parameter."""
        parameter = self.host._parameters[name]
        assert parameter is not None
        return parameter

    def bias_value(self) -> Tensor | None:
        """The bias the base module reads, if it has one."""
        bias = self.host._parameters.get("bias")
        return None if bias is None else self.value("bias", bias)

    def hold(self) -> dict[str, Tensor] | None:
        """Values that are computed (not merely stored), so that one call of the host computes each of them once."""
        computed = self._layers().computed
        if not computed:
            return None
        return {name: self.value(name, self.original(name)) for name in computed}

    def _layers(self) -> Layers:
        running = self.state.running
        if torch.compiler.is_compiling():  # what is remembered would be a condition of the graph
            return self._form(running)
        if self._formed is None or not (self._seen is running or self._seen == running):
            self._formed, self._seen = self._form(running), running
        return self._formed

    def _form(self, running: tuple[str | Bound, ...] | Bank) -> Layers:
        base: Callable[..., Any] = base_class(type(self.host)).forward
        if self.few_rows is not None and not torch.compiler.is_compiling():
            base = self.few_rows
        onion = Inner(self, base, None, None)
        together = None if isinstance(running, tuple) else running.piece(self)
        names = (*running, FUSED) if isinstance(running, tuple) and running else ()
        for piece in self.pieces(names, None) if together is None else (together,):
            onion = Inner(self, base, piece, onion)
        values = {name: tuple(self.pieces(names, name)) for name in self.parameters_touched()}
        values = {name: pieces for name, pieces in values.items() if pieces}
        computed = tuple(name for name, pieces in values.items() if not all(p.stored for p in pieces))
        return Layers(onion, values, computed)

    def _forget(self) -> None:
        # Not by assignment: a module asks of every value whether it is a parameter, a buffer or a module.
        self.__dict__.update(_seen=None, _formed=None)

    # -- life outside the call -----------------------------------------------------------------------------------------

    @property
    def _forward_pre_hooks(self) -> dict[int, Any]:
        """A pretence of a hook while pieces run: torch's fused TransformerEncoderLayer reads its children's weights
        without calling them, which would leave the pieces out, and it steps aside where any child has a hook.
        """
        return {0: None} if self.__dict__.get("state") is not None and self.state.running else {}

    @_forward_pre_hooks.setter
    def _forward_pre_hooks(self, value: Any) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None, "_formed": None, "held": None}


RESERVED = frozenset(dir(Inlays)) | {
    FUSED, "state", "host", "transposed", "own_forward", "held", "few_rows", "training"
}  # fmt: skip
"""Names that an adapter cannot have, because a host's `inlays` uses them itself."""


@functools.cache
def hosted(base: type[nn.Module], parameters: frozenset[str]) -> type[nn.Module]:
    """The specialised subclass of `base` whose `parameters` read through their pieces; one per pair, ever."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inlays = self._modules[CHILD]
        held = inlays.hold()  # type: ignore[union-attr, operator]
        if held is None:
            return inlays.call()(*args, **kwargs)  # type: ignore[union-attr, operator]
        inlays.held = held  # type: ignore[union-attr]
        try:
            return inlays.call()(*args, **kwargs)  # type: ignore[union-attr, operator]
        finally:
            inlays.held = None  # type: ignore[union-attr]

    namespace: dict[str, Any] = {
        "forward": functools.wraps(base.forward)(forward),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_inlay_base": base,
        "_inlay_parameters": parameters,
    }
    for name in parameters:
        namespace[name] = property(_reader(name))
    if issubclass(base, nn.Sequential):
        namespace |= sequential.without(CHILD)
    return type(base.__name__, (base,), namespace)


def _reader(name: str) -> Callable[[nn.Module], Any]:
    def read(host: nn.Module) -> Any:
        original = host._parameters[name]
        inlays = host._modules.get(CHILD)
        if inlays is None or original is None:
            return original
        return inlays.value(name, original)  # type: ignore[operator]

    return read


def _reduce(host: nn.Module, protocol: Any) -> Any:
    """Pickle and deepcopy by the base class and the parameter names, since the subclass has no importable path."""
    cls = type(host)
    state = host.__getstate__()  # type: ignore[no-untyped-call]
    return _rebuild, (cls._inlay_base, cls._inlay_parameters), state  # type: ignore[attr-defined]


def _rebuild(base: type[nn.Module], parameters: frozenset[str]) -> nn.Module:
    cls = hosted(base, parameters)  # type: ignore[arg-type]  # (classes hash; nn.Module's stub says otherwise)
    return cls.__new__(cls)


def base_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class a host had before it was specialised (the class itself for any other module)."""
    base: type[nn.Module] = getattr(cls, "_inlay_base", cls)
    return base


def inlays_of(module: nn.Module) -> Inlays | None:
    """The pieces sitting in `module`, or None when it is no host."""
    found = module._modules.get(CHILD)
    return found if isinstance(found, Inlays) else None


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Inlays]]:
    """Every host in the model: (path, module, its pieces)."""
    for path, module in model.named_modules():
        inlays = inlays_of(module)
        if inlays is not None:
            yield path, module, inlays


def open_host(module: nn.Module, state: State, transposed: bool) -> Inlays:
    """Make `module` a host (or return its pieces if it is one already)."""
    inlays = inlays_of(module)
    if inlays is None:
        inlays = Inlays(module, state, transposed)
        inlays.__dict__["training"] = module.training
        module.add_module(CHILD, inlays)
        refresh_class(module)
    return inlays


def refresh_class(module: nn.Module) -> None:
    """Give a host the class that fits the parameters its pieces stand for."""
    inlays = inlays_of(module)
    assert inlays is not None
    base = base_class(type(module))
    module.__class__ = hosted(base, inlays.parameters_touched())  # type: ignore[arg-type]


def close_host(module: nn.Module) -> None:
    """Make a host what it was: class, children, and a `forward` of its own if it had one."""
    inlays = inlays_of(module)
    assert inlays is not None
    del module._modules[CHILD]
    module.__class__ = base_class(type(module))
    if inlays.own_forward is not None:
        module.__dict__["forward"] = inlays.own_forward
