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
from inlay.engine.composition import names_in
from inlay.engine.host import Inlays, State, inlays_of
from inlay.engine.piece import Piece
from inlay.engine.sites import kind_of
from inlay.errors import AdapterError, UnsupportedError

KEPT = 4
"""So many sets of adapters keep what they formed together; the one used longest ago is forgotten."""
ROWS_STAY = ("linear", "norm", "embedding", "conv")
"""Modules that are called with one tensor and treat its rows alike."""


Layout = tuple[tuple[int, int], ...]
"""The adapters at one place, by their number in the bank, each with its number of columns there."""


class Bank:
    """Some adapters by number, and which of them each row uses."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.rows: list[int] | None = None
        """The adapter of each row of the batch, −1 for none; None when all rows do as the gates say."""
        self.index = torch.zeros(0, dtype=torch.long, device=device)
        """The same as a tensor: another one for each choice of rows."""
        self.gates = torch.zeros(1, len(names), device=device)
        """(rows or 1, adapters): by how much each adapter counts."""
        self._formed: dict[Any, Any] = {}
        """What was formed for these rows once, for all places alike."""
        self._pieces: dict[int, Piece] = {}

    def choose(self, rows: Sequence[str | None], device: torch.device) -> None:
        """Row i runs under the adapter rows[i]."""
        numbers = [-1 if name is None else self.names.index(name) for name in rows]
        if numbers == self.rows and device == self.index.device:
            return
        self.rows = numbers
        self.index = torch.tensor(numbers, device=device)
        self.gates = (self.index[:, None] == torch.arange(len(self.names), device=device)).float()
        self._formed = {}

    def weigh(self, weights: dict[str, float]) -> None:
        """Every row runs under these adapters, each with its weight; in place, so that nothing is traced again."""
        if self.rows is not None:
            raise AdapterError("inside per_row the rows decide what is active: leave the block first")
        values = [weights.get(name, 0.0) for name in self.names]
        self.gates.copy_(torch.tensor([values]))

    def gate(self, layout: Layout, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(entries of x or 1, columns): by how much each column counts for each entry."""
        if self.rows is None:
            return self._spread(self.gates, layout, x, dtype)
        key = layout, x.shape[0], x.device, dtype
        if key not in self._formed:
            gates = self.gates.repeat_interleave(repeats(x, len(self.rows)), 0)
            self._formed[key] = self._spread(gates, layout, x, dtype)
        formed: Tensor = self._formed[key]
        return formed

    def _spread(self, gates: Tensor, layout: Layout, x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.cat([gates[:, n : n + 1].expand(-1, columns) for n, columns in layout], 1).to(x.device, dtype)

    def places(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """For each row, which of the layout's adapters is its own (rows,), and 1 where one is, else 0 (rows, 1, 1)."""
        if layout not in self._formed:
            own = self.index[:, None] == torch.tensor([n for n, _ in layout], device=self.index.device)
            self._formed[layout] = own.int().argmax(1), own.any(1)[:, None, None]
        place, here = self._formed[layout]
        return place, here

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pieces": {}, "_formed": {}}

    def piece(self, inlays: Inlays) -> Piece | None:
        """What runs in one host in place of the pieces of the bank's adapters; None where they have none."""
        found = {n: tuple(inlays.all_pieces(name)) for n, name in enumerate(self.names)}
        present = {n: pieces for n, pieces in found.items() if pieces}
        if not present:
            return None
        if id(inlays) not in self._pieces:
            self._pieces[id(inlays)] = together(present, self) or Segments(self)
        return self._pieces[id(inlays)]


def together(present: dict[int, tuple[Piece, ...]], bank: Bank) -> Piece | None:
    """One piece that computes what these of one place do, by their number in the bank; None where there is none."""
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
    if x.dim() < 2 or (x.shape[0] != rows and (x.dim() < 3 or x.shape[0] % rows)):
        raise UnsupportedError(
            f"per_row was given {rows} rows, and a module inside the model was called with shape {tuple(x.shape)}: "
            "name an adapter (or None) for each row of the batch; models that mix rows cannot be served this way"
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
    of its rows; with gradient checkpointing, `backward` belongs inside the block, since it runs the model again. The
    batch comes first in every tensor; with beams, several consecutive entries share a row. An adapter that holds NaN or
    inf may spoil the rows of others. Adapters that act on more than single modules (prompts, prefixes, composed places)
    and models that mix rows (mixtures of experts) are refused with UnsupportedError.

    Without gradients, what the adapters formed together is kept between calls, and made again when a parameter's
    version changes; a change through `parameter.data` of the same memory has no version and is not noticed.
    """
    adapters = adapters_of(model)
    if adapters.state.merged:
        raise AdapterError(f"adapters {list(adapters.state.merged)} are merged: call inlay.unmerge(model) first")
    if adapters.state.bank is not None:
        raise AdapterError("per_row inside per_row, or on a switchable model: end the other one first")
    if isinstance(rows, str) or not len(rows) or any(not isinstance(name, str | None) for name in rows):
        raise AdapterError(f"per_row takes one adapter name, or None, for each row of the batch; got {rows!r}")
    bank = _bank(model, adapters, tuple(sorted({adapters.get(name).name for name in rows if name is not None})))
    bank.choose(rows, next(iter(model.parameters())).device)
    adapters.state.bank = bank
    try:
        yield model
    finally:
        adapters.state.bank = None


def switchable(model: nn.Module, on: bool = True) -> nn.Module:
    """Let `activate`, `using`, `disabled` and `weigh` write numbers that the model reads, not change its course.

    A compiled model then goes on without compiling again. Every call computes all loaded adapters: this is for a few.
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
    active = names_in(adapters.state.active)
    if active != adapters.state.active:
        raise AdapterError("a composition is active, which no numbers can switch: activate adapters by name first")
    bank.weigh(dict.fromkeys(active, 1.0))
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
    bank = adapters.banks.pop(names, None)
    if bank is None:
        for name in names:
            for site, piece in adapters.get(name).pieces():
                if kind_of(site.module) not in ROWS_STAY or site.owner is not None or "expert" in site.path:
                    raise UnsupportedError(
                        f"adapter {name!r} cannot be chosen row by row: {type(piece).__name__} at "
                        f"{site.name or 'the model itself'} works on the whole batch; run its rows by themselves, with "
                        "inlay.using(model, ...)"
                    )
        bank = Bank(names, next(iter(model.parameters())).device)
    adapters.banks[names] = bank
    for oldest in list(adapters.banks)[:-KEPT]:
        del adapters.banks[oldest]
    return bank
