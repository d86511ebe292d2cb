"""What a method is made of: `Piece`, the module set into a host, and `Method`, the frozen description of it.

A method file holds one `Method` (a frozen dataclass: what the user writes); its `Piece` (an `nn.Module`: what computes)
stands there too, or in `pieces/`. The engine knows neither by name: it asks the method for its sites and pieces, and
calls the pieces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from inlay.errors import CheckpointError, ConfigError, TargetError, UnsupportedError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from inlay.engine.bank import Bank
    from inlay.engine.controller import Controller
    from inlay.engine.sites import Site, SiteIndex, Targets


class Piece(nn.Module):
    """One onion layer in a host: `forward(inner, x, ...)` calls `inner` and returns the output.

    On a *parameter* site the host never calls `forward`; it reads `weight(W)` wherever the model reads W.

    A piece whose effect is a change of the host's parameters also defines `weight` (and `bias`, if it touches it):
    merging, unmerging and export follow from these. Weights are always given as the site shows them: a linear's W is
    (out, in) even where the host stores it transposed (GPT-2's Conv1D).
    """

    parameter: str | None = None
    """The host's parameter that this piece stands for (set by the host); None for a layer around the host's call."""
    stored: bool = False
    """True when `weight(W)` merely returns a tensor that the piece keeps, so that nothing is gained by caching it."""
    replaces: bool = False
    """True when `weight(W)` does not depend on W: a trained copy."""

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the host's output; `inner` is the next piece, or the base module."""
        return inner(*args, **kwargs)

    def weight(self, weight: Tensor) -> Tensor:
        """W' with this piece's effect folded in. Raises UnsupportedError where no such W' exists."""
        raise UnsupportedError(
            f"{type(self).__name__} is not a change of the weights, so it cannot be merged; keep it attached"
        )

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """The host's bias with this piece's effect folded in; most pieces leave it alone."""
        return bias

    @property
    def current_rank(self) -> int | None:
        """How many ranks it has, where training decides that."""
        return None

    @property
    def mergeable(self) -> bool:
        """Whether `weight` is defined."""
        return type(self).weight is not Piece.weight

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """A (r, in, …), B (out, r, …) and s where the piece is ΔW = s · B A and nothing else; None otherwise."""
        return None

    @classmethod
    def together(cls, pieces: Mapping[int, Piece], bank: Bank) -> Piece | None:
        """One piece in place of these, of several adapters by their number in the bank; None where there is none."""
        return None

    def values_of(self, other: Piece) -> list[tuple[Tensor, Tensor]]:
        """(own tensor, value) for each tensor of this piece: with them it computes what `other` computes.

        Raises CheckpointError where no values make it so, as when sizes or settings differ.
        """
        own, its = ({**dict(piece.named_parameters()), **dict(piece.named_buffers())} for piece in (self, other))
        if own.keys() != its.keys():
            raise CheckpointError(f"it has other tensors ({', '.join(its)}) than there are here ({', '.join(own)})")
        for name, tensor in own.items():
            if tensor.shape != its[name].shape:
                raise CheckpointError(f"its {name} is {tuple(its[name].shape)}, and {tuple(tensor.shape)} here")
        for (name, here), there in zip(_settings(self).items(), _settings(other).values(), strict=True):
            if here != there:
                raise CheckpointError(f"its {name} is {there!r}, and {here!r} here")
        return [(tensor, its[name]) for name, tensor in own.items()]

    def file_tensors(self) -> dict[str, Tensor]:
        """This piece's tensors by their name in a checkpoint file, after the path of the host (see `Method.export`)."""
        return dict(self.named_parameters())

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors of the names and shapes that `file_tensors` gives."""
        with torch.no_grad():
            for name, parameter in self.file_tensors().items():
                parameter.copy_(tensors[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way of adapting a model: where its pieces go and how to make one.

    Subclasses are frozen dataclasses, one per file in `inlay/methods`, named in the field's terms. A subclass sets
    `kind` (its registered name, equal to the file's), `hosts` (the site kinds it can sit in) and, unless it overrides
    `sites`, `default_targets`.
    """

    kind: ClassVar[str]
    hosts: ClassVar[frozenset[str]] = frozenset({"linear"})
    default_targets: ClassVar[Any] = "all-linear"
    peft_type: ClassVar[str | None] = None
    paper: ClassVar[str] = ""
    tasks_field: ClassVar[str | None] = None
    """The field that says how many tasks it learns at once, where calls of the model name the task of each row."""

    targets: Targets = None
    """Where: roles ("query,value"), names, "re:…" patterns, a list of these, or a callable (site) -> bool."""
    exclude: Targets = None
    """Places to leave out, in the same grammar."""
    layers: Any = None
    """Only these layers: an index, a list of indices, or ranges such as "0-3,8"."""
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Other field values for some places: {"pattern": {"r": 16}}; for each field, the first match wins."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            KINDS[cls.kind] = cls

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Refuse a field that does not exist with the nearest ones, which a dataclass alone would not name."""
        reject_unknown(fields, (field.name for field in dataclasses.fields(cls)), cls.__name__)
        return super().__new__(cls)

    def parts(self, index: SiteIndex) -> list[Method]:
        """What is attached in place of this method: itself, or those that a named combination consists of."""
        return [self]

    # -- where -------------------------------------------------------------------------------------------------------

    def sites(self, index: SiteIndex) -> list[Site]:
        """The places this method sits in, in the model's order. Raises TargetError when a target matches nothing."""
        return index.select(
            self.targets if self.targets is not None else self.default_targets,
            hosts=self.hosts,
            exclude=self.exclude,
            layers=self.layers,
            what=type(self).__name__,
        )

    def at(self, site: Site) -> Method:
        """This method with the overrides that apply at `site`."""
        changes: dict[str, Any] = {}
        for pattern, fields in self.overrides.items():
            if site.matches(pattern):
                changes = {**fields, **changes}
        return self.replace(**changes) if changes else self

    def replace(self, **changes: Any) -> Method:
        """A copy with some fields changed; an unknown field is a ConfigError naming the nearest."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"{type(self).__name__} has no field {name!r}{did_you_mean(name, names)}")
        return dataclasses.replace(self, **changes)

    # -- what --------------------------------------------------------------------------------------------------------

    def piece(self, site: Site) -> Piece:
        """A fresh piece for one site."""
        raise NotImplementedError

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        """Every piece of this method, site by site. Methods whose pieces share state override this.

        Raises TargetError when an override matches none of the sites.
        """
        for pattern in self.overrides:
            if not any(site.matches(pattern) for site in sites):
                raise TargetError(
                    f"{type(self).__name__}: the override {pattern!r} matches none of its {len(sites)} places"
                    f"{did_you_mean(pattern, [site.tail for site in sites])}"
                )
        return [(site, self.at(site).piece(site)) for site in sites]

    @property
    def wants_data(self) -> bool:
        """Whether `prepare` has to see rows before the method can be attached."""
        return False

    def prepare(self, model: nn.Module, batches: Any) -> Method:
        """What to attach to this model, now that batches of its training rows can be looked at (`engine.batches`).

        Called on the bare model, before `attach`, by `inlay train` where `wants_data`, or by the user. Returns a copy
        that holds what was found, and leaves the model and its random states as they were. A run that is resumed, and
        an adapter that is loaded, have it in their files: this is not called for them.
        """
        return self

    def on_attach(self, model: nn.Module, pieces: Sequence[tuple[Site, Piece]]) -> None:
        """Called once the pieces sit in the model, for methods that must also set something on it."""

    def on_detach(self, model: nn.Module, pieces: Sequence[tuple[Site, Piece]]) -> None:
        """Called before the pieces leave: undo what `on_attach` did."""

    def controller(self, pieces: Mapping[str, Piece]) -> Controller | None:
        """The object that takes part in the training loop, for methods that need one. Keys are site names."""
        return None

    # -- files -------------------------------------------------------------------------------------------------------

    def export(self, pieces: Sequence[tuple[Site, Piece]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(tensors of `adapter_model.safetensors`, tensors of the second file that only Inlay reads)."""
        tensors: dict[str, Tensor] = {}
        for site, piece in pieces:
            tensors |= {self.file_key(site, name): tensor for name, tensor in piece.file_tensors().items()}
        return tensors, {}

    def file_key(self, site: Site, name: str) -> str:
        """The key of a piece's tensor in the file: HF peft's rule, `base_model.model.<path of the host>.<name>`."""
        return ".".join(("base_model.model", *filter(None, (site.file_path, name))))

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        """Copy the tensors of both files into the pieces, *removing* from the dicts what was used.

        What is missing or of another shape is a CheckpointError here; what is left over is one in the caller.
        """
        for site, piece in pieces:
            found = {
                name: take(tensors, self.file_key(site, name), tensor.shape)
                for name, tensor in piece.file_tensors().items()
            }
            piece.load_file_tensors(found)

    def for_file(self) -> Method:
        """The method as a file describes it: without what mattered only when its pieces were made."""
        return self

    def rides_with(self, methods: Sequence[Method]) -> bool:
        """Whether HF peft keeps this method inside the file of another of these methods."""
        return False

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        """The fields of HF peft's `adapter_config.json` that describe this method at these sites."""
        return {}

    def peft_state(self, pieces: Sequence[tuple[Site, Piece]]) -> dict[str, Any]:
        """Further fields of that config, which training has decided (ranks that were pruned)."""
        return {}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        """The method, or methods, that a HF peft config describes."""
        raise UnsupportedError(f"{cls.__name__} cannot be read from a HF peft config")


SETTING = (bool, int, float, str, tuple, torch.dtype)
KINDS: dict[str, type[Method]] = {}
"""Methods whose file has been imported, by kind; `engine.registry` imports on demand."""


def _settings(piece: Piece) -> dict[str, Any]:
    """The numbers and names that decide what a piece computes outside training."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in piece.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, SETTING)
        and name not in ("training", "dropout", "parameter")
        and name[0] != "_"
        # Modules in a tuple are another piece's, which is compared by itself.
        and not (isinstance(value, tuple) and any(isinstance(entry, nn.Module) for entry in value))
    }


def take(tensors: dict[str, Tensor], key: str, shape: torch.Size) -> Tensor:
    """Remove and return `tensors[key]`; a CheckpointError when it is missing or of another shape."""
    if key not in tensors:
        raise CheckpointError(f"the adapter file has no tensor {key!r}{did_you_mean(key, tensors)}")
    tensor = tensors.pop(key)
    if tensor.shape != shape:
        raise CheckpointError(
            f"the tensor {key!r} has shape {tuple(tensor.shape)} in the adapter file; this model needs {tuple(shape)}: "
            "the file was made for another base model or another rank"
        )
    return tensor


def trainable_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half-precision bases (the optimiser needs the bits), the base's own dtype otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) or not dtype.is_floating_point else dtype


def reject_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ConfigError for the first name that is not known, with the nearest ones."""
    known = list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"{where} has no field {name!r}{did_you_mean(name, known)}")
