"""Methods over other adapters: what several loaded, frozen ones add at each place, weighed by what is trained here.

    h + Σ_n w_n(h, u) ⊙ u_n          u_n: what adapter n alone adds to the output h of the place

On the norm after a residual addition (Pfeiffer's placement) the sum goes into the addition and the norm runs again, as
it does for one adapter: LN(t + Σ …), h = LN(t). The adapters run inside these pieces and must not be active themselves.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.combining.inner import Known, around
from inlay.engine.adapters import Adapter, Placed, find_adapters
from inlay.engine.host import inlays_of
from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.sub_layers import SubLayers
from inlay.engine.trained_copy import ModulesToSave
from inlay.errors import AdapterError, CheckpointError, ConfigError, UnsupportedError, did_you_mean
from inlay.pieces.bottlenecks.bottleneck import AfterPiece, BesidePiece, TwicePiece, first_of
from inlay.pieces.checks import CheckedMethod
from inlay.pieces.lora.piece import LoRAPiece


class OverPiece(Piece):
    """At one place of the adapters: runs them, and adds `mix` of what they add."""

    def __init__(self, adapters: tuple[str, ...]) -> None:
        super().__init__()
        self.adapters = adapters

    def mix(self, h: Tensor, changes: list[Tensor]) -> Tensor:
        """What is added to h (…, d), from what each adapter would add."""
        raise NotImplementedError

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The output with what is made of the adapters' own."""
        own = [self._pieces(inner, name) for name in self.adapters]
        if all(len(pieces) == 1 and isinstance(pieces[0], TwicePiece) for pieces in own):
            t, *rest = args
            h = inner(*args, **kwargs)
            mixed = self.mix(h, [piece.bottleneck(h) for (piece,) in own])
            return inner(t + mixed.to(t.dtype), *rest, **kwargs)
        output = inner(*args, **kwargs)
        h = output[0] if isinstance(output, tuple) else output
        x = args[0] if args else next(iter(kwargs.values()))

        def change(name: str, pieces: tuple[Any, ...]) -> Tensor:
            if len(pieces) == 1 and isinstance(pieces[0], AfterPiece | BesidePiece):
                after = isinstance(pieces[0], AfterPiece)
                found: Tensor = pieces[0].bottleneck(h if after else x)
                return found
            if len(pieces) == 1 and type(pieces[0]) is LoRAPiece:  # in half precision a difference would be roundings
                own: LoRAPiece = pieces[0]
                return own.scale * own.change(inner.module, x)
            alone = around(Known(inner, args, lambda: output), (name,))(*args, **kwargs)
            difference: Tensor = (alone[0] if isinstance(alone, tuple) else alone) - h
            return difference

        changes = [change(name, pieces) for name, pieces in zip(self.adapters, own, strict=True)]
        return first_of(output, lambda h: h + self.mix(h, changes).to(h.dtype))

    def _pieces(self, inner: Any, name: str) -> tuple[Any, ...]:
        """The pieces of one adapter here; AdapterError when it is gone, or runs by itself too."""
        found, active = tuple(inner.inlays.pieces((name,), None)), inner.inlays.state.active
        if not found:
            raise AdapterError(f"adapter {name!r} is not loaded any more, and {type(self).__name__} runs it: load it")
        if name in active:
            mine = [one for one in active if one not in self.adapters]
            raise AdapterError(
                f"adapter {name!r} is active, and runs inside {type(self).__name__} too: activate the adapter that is "
                f"made of it alone, as in inlay.activate(model, {', '.join(map(repr, mine))})"
            )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverAdapters(CheckedMethod):
    """Base of the methods over other adapters: it sits wherever they sit."""

    hosts = frozenset({"linear", "norm", "embedding", "attention", "module"})
    learning_rate: ClassVar[float]

    adapters: Sequence[str] = ()
    """Names of the loaded adapters, in the order that the trained tensors have."""

    def __post_init__(self) -> None:
        what = type(self).__name__
        named = isinstance(self.adapters, Iterable) and all(isinstance(name, str) for name in self.adapters)
        if isinstance(self.adapters, str) or not self.adapters or not named:
            raise ConfigError(f"{what}(adapters={self.adapters!r}): name loaded adapters, as in ('law', 'poems')")
        if len(set(self.adapters)) != len(self.adapters):
            raise ConfigError(f"{what}(adapters={self.adapters!r}): an adapter is named twice")
        if self.targets is not None:
            raise ConfigError(f"{what}(targets={self.targets!r}): it sits where its adapters do; use exclude or layers")
        object.__setattr__(self, "adapters", tuple(self.adapters))

    @property
    def running(self) -> tuple[str, ...]:
        """Every adapter that runs inside."""
        return tuple(self.adapters)

    def over(self, site: Site, width: int) -> OverPiece:
        """A fresh piece for a place whose output has `width` features."""
        raise NotImplementedError

    def sites(self, index: SiteIndex) -> list[Site]:
        """The places of the adapters. AdapterError when one is not loaded, UnsupportedError where they differ."""
        found = find_adapters(index.model)
        loaded = {} if found is None else found.loaded
        for name in self.running:
            if name not in loaded:
                have = ", ".join(map(repr, loaded)) or "none"
                raise AdapterError(
                    f"{type(self).__name__} is made of the adapter {name!r}, which is not loaded (loaded: {have})"
                    f"{did_you_mean(name, loaded)}; load it under that name first"
                )
        places = [set(self._places(loaded[name])) for name in self.running]
        for name, own in zip(self.running, places, strict=True):
            if own != places[0]:
                where = sorted(own ^ places[0])[0]
                raise UnsupportedError(
                    f"{type(self).__name__}: {self.running[0]!r} and {name!r} do not sit at the same places ({where} "
                    "has only one of them): use adapters of one placement"
                )
        return index.select(
            lambda site: site.name in places[0],
            hosts=self.hosts,
            exclude=self.exclude,
            layers=self.layers,
            what=type(self).__name__,
        )

    def _places(self, adapter: Adapter) -> Iterator[str]:
        """Where an adapter sits. UnsupportedError for pieces whose output cannot be told from the base's."""
        for site, piece in own_pieces(adapter):
            known = isinstance(piece, AfterPiece | BesidePiece | TwicePiece)
            if not known and (site.kind not in ("linear", "embedding") or site.owner is not None):
                raise UnsupportedError(
                    f"{type(self).__name__} cannot take in the adapter {adapter.name!r}: {type(piece).__name__} at "
                    f"{site.name or 'the model itself'} is neither a bottleneck nor a change of a linear's output"
                )
            yield site.name

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        """A piece for each place, as wide as its output."""
        layers = SubLayers(SiteIndex(model))
        return [(site, self.over(site, layers.widths(site)[1])) for site in sites]

    # -- files -------------------------------------------------------------------------------------------------------

    def export(self, pieces: Sequence[tuple[Site, Piece]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The trained tensors, and beside them a fingerprint of each adapter."""
        extra = {f"fingerprint.{name}": fingerprint(name, pieces) for name in self.running}
        return super().export(pieces)[0], extra

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        """Take the tensors over. CheckpointError when an adapter is not the one that they were trained over."""
        super().import_(pieces, tensors, extra)
        for name in self.running:
            there, here = extra.pop(f"fingerprint.{name}", None), fingerprint(name, pieces)
            if there is None or not torch.equal(there, here):
                raise CheckpointError(
                    f"the file was trained over another adapter than the {name!r} that is loaded (fingerprint "
                    f"{'missing' if there is None else written(there)} there, {written(here)} here): load that one"
                )


def own_pieces(adapter: Adapter) -> Placed:
    """Every (site, piece) of an adapter but the trained copies of heads."""
    pairs = zip(adapter.methods, adapter.placed, strict=True)
    return [one for method, placed in pairs if not isinstance(method, ModulesToSave) for one in placed]


def fingerprint(name: str, pieces: Sequence[tuple[Site, Piece]]) -> Tensor:
    """16 bytes that tell the values of an adapter at these places from any others."""
    digest = hashlib.blake2b(digest_size=16)
    for site, _ in pieces:
        inlays = inlays_of(site.module)
        for piece in () if inlays is None else inlays.pieces((name,), None):
            for key, tensor in sorted(piece.file_tensors().items()):
                digest.update(f"{site.name} {key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def written(found: Tensor) -> str:
    """A fingerprint as people compare it."""
    return bytes(found.tolist()).hex()[:12]
