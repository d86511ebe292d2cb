"""Several adapters in one call: another one for each row of a batch, or gates that a compiled model reads as data.

    with inlay.per_row(model, ["law", "poems", None, "law"]):
        model(**batch)                       # row 0 runs under "law", row 2 as the base

    inlay.switchable(model)                  # from now on `activate` writes numbers, and nothing is compiled again
    model = torch.compile(model)

While a bank is in force, the pieces that several adapters have at one place are asked to work together
(`Piece.together`: LoRA puts all A into one product, with a gate on each row). Where they cannot, the rows of each
adapter go through the host by themselves, which works for any piece in a module that is called with one tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.adapters import Adapters, adapters_of
from inlay.engine.host import Inlays, State, inlays_of
from inlay.engine.piece import Piece
from inlay.engine.sites import kind_of
from inlay.errors import AdapterError, UnsupportedError

ROWS_STAY = ("linear", "norm", "embedding", "conv")
"""Modules that are called with one tensor and treat its rows alike."""


class Bank:
    """Some adapters by number, and which of them each row uses."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.rows: list[int] | None = None
        """The adapter of each row of the batch, −1 for none; None when all rows do as the gates say."""
        self.index = torch.zeros(0, dtype=torch.long, device=device)
        """The same as a tensor."""
        self.gates = torch.zeros(1, len(names), device=device)
        """(rows or 1, adapters): by how much each adapter counts."""
        self._pieces: dict[int, Piece] = {}

    def choose(self, rows: Sequence[str | None]) -> None:
        """Row i runs under the adapter rows[i]."""
        self.rows = [-1 if name is None else self.names.index(name) for name in rows]
        self.index = torch.tensor(self.rows, device=self.gates.device)
        self.gates = (self.index[:, None] == torch.arange(len(self.names), device=self.gates.device)).float()

    def weigh(self, weights: dict[str, float]) -> None:
        """Every row runs under these adapters, each with its weight; in place, so that nothing is traced again."""
        if self.rows is not None:
            raise AdapterError("inside per_row the rows decide what is active: leave the block first")
        values = [weights.get(name, 0.0) for name in self.names]
        self.gates.copy_(torch.tensor([values]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pieces": {}}

    def piece(self, inlays: Inlays) -> Piece | None:
        """What runs in one host in place of the pieces of the bank's adapters; None where they have none."""
        found = {n: tuple(inlays.all_pieces(name)) for n, name in enumerate(self.names)}
        present = {n: pieces for n, pieces in found.items() if pieces}
        if not present:
            return None
        if id(inlays) not in self._pieces:
            self._pieces[id(inlays)] = _together(present, self) or Segments(self)
        return self._pieces[id(inlays)]


def _together(present: dict[int, tuple[Piece, ...]], bank: Bank) -> Piece | None:
    if any(len(pieces) != 1 for pieces in present.values()):
        return None
    single = {n: pieces[0] for n, pieces in present.items()}
    kinds = {type(piece) for piece in single.values()}
    return kinds.pop().together(single, bank) if len(kinds) == 1 else None


class Segments(Piece):
    """The rows of each adapter through the host by themselves: right for any piece, one call an adapter."""

    def __init__(self, bank: Bank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's outputs, row by row under the adapter of each."""
        host, state, rows = inner.module, inner.inlays.state, self.bank.rows
        if rows is None or len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise UnsupportedError(
                f"per_row cannot split a call of {type(host).__name__} with more than one tensor: run the rows of each "
                "adapter by themselves, with inlay.using(model, ...)"
            )
        x = args[0]
        number = repeats(x, len(rows)) if rows else 1
        order: list[Tensor] = []
        parts: list[Tensor] = []
        for adapter in sorted(set(rows)):
            chosen = (self.bank.index == adapter).repeat_interleave(number).nonzero()[:, 0]
            with _only(state, (self.bank.names[adapter],) if adapter >= 0 else ()):
                parts.append(type(host).forward(host, x.index_select(0, chosen)))
            order.append(chosen)
        return torch.cat(parts).index_select(0, torch.cat(order).argsort())


def repeats(x: Tensor, rows: int) -> int:
    """How many consecutive entries of x (…) belong to one row of the batch: 1, or more where beams share it.

    Raises UnsupportedError when x has lost its rows, as inside a mixture of experts.
    """
    if x.shape[0] != rows and (x.dim() < 3 or x.shape[0] % rows):
        raise UnsupportedError(
            f"per_row was given {rows} rows, and a module inside the model was called with {x.shape[0]}: name an adapter "
            "(or None) for each row of the batch; models that mix the rows of a batch cannot be served this way"
        )
    return int(x.shape[0]) // rows


@contextlib.contextmanager
def _only(state: State, names: tuple[str, ...]) -> Iterator[None]:
    bank, active = state.bank, state.active
    state.bank, state.active = None, names
    try:
        yield
    finally:
        state.bank, state.active = bank, active


@contextlib.contextmanager
def per_row(model: nn.Module, rows: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within the block, row i of every batch runs under the adapter rows[i], or as the base where that is None.

    Outputs equal those of each row by itself under its adapter. Works in training too: each adapter gets the gradients
    of its rows. With beams, several consecutive entries share a row. Adapters that act on more than single modules
    (prompts, prefixes, composed places) and models that mix rows (mixtures of experts) are refused with UnsupportedError.

    Without gradients, the stacked matrices are kept between calls, and made again when a parameter's version changes;
    a change through `parameter.data` has no version and is not noticed.
    """
    adapters = adapters_of(model)
    if adapters.state.merged:
        raise AdapterError(f"adapters {list(adapters.state.merged)} are merged: call inlay.unmerge(model) first")
    if adapters.state.bank is not None:
        raise AdapterError("per_row inside per_row, or on a switchable model: end the other one first")
    if isinstance(rows, str) or not rows:
        raise AdapterError(f"per_row takes one adapter name, or None, for each row of the batch; got {rows!r}")
    bank = _bank(model, adapters, tuple(sorted({adapters.get(name).name for name in rows if name is not None})))
    bank.choose(rows)
    adapters.state.bank = bank
    try:
        yield model
    finally:
        adapters.state.bank = None


def switchable(model: nn.Module, on: bool = True) -> nn.Module:
    """Let `activate`, `using`, `disabled` and `weigh` write numbers that the model reads, instead of changing its course.

    A compiled model then goes on without compiling again. Every call computes all loaded adapters, so this is for a few.
    Loading or detaching an adapter ends it. Raises UnsupportedError where an adapter is more than low-rank changes of
    linears, AdapterError while merged.
    """
    adapters = adapters_of(model)
    if adapters.state.bank is not None and adapters.state.bank.rows is not None:
        raise AdapterError("inside per_row the rows decide what is active: leave the block first")
    if not on:
        adapters.state.bank = None
        return model
    if adapters.state.merged:
        raise AdapterError(f"adapters {list(adapters.state.merged)} are merged: call inlay.unmerge(model) first")
    bank = Bank(tuple(adapters.loaded), next(iter(model.parameters())).device)
    for module in {id(site.module): site.module for a in adapters.loaded.values() for site, _ in a.pieces()}.values():
        inlays = inlays_of(module)
        assert inlays is not None
        piece = bank.piece(inlays)
        if isinstance(piece, Segments):
            raise UnsupportedError(
                f"switchable is for low-rank changes of linears (LoRA), and {type(module).__name__} has more: "
                "activate compiles again for each set of adapters, once"
            )
    bank.weigh(dict.fromkeys(adapters.state.active, 1.0))
    adapters.state.bank = bank
    return model


def weigh(model: nn.Module, weights: dict[str, float]) -> None:
    """Run these adapters of a switchable model, each times its weight: y = W x + Σ weight · s B A x."""
    adapters = adapters_of(model)
    if adapters.state.bank is None:
        raise AdapterError("weights need a switchable model: call inlay.switchable(model) first")
    adapters.state.bank.weigh({adapters.get(name).name: float(weight) for name, weight in weights.items()})
    adapters.state.active = tuple(weights)


def _bank(model: nn.Module, adapters: Adapters, names: tuple[str, ...]) -> Bank:
    """The bank of these adapters, made at first use. UnsupportedError for adapters that no bank can hold."""
    if names not in adapters.banks:
        for name in names:
            for site, piece in adapters.get(name).pieces():
                if kind_of(site.module) not in ROWS_STAY or "expert" in site.path:
                    raise UnsupportedError(
                        f"adapter {name!r} cannot be chosen row by row: {type(piece).__name__} at {site.name} works on "
                        "the whole batch; run its rows by themselves, with inlay.using(model, ...)"
                    )
        device = next(iter(model.parameters())).device
        adapters.banks[names] = Bank(names, device)
    return adapters.banks[names]
