"""What is attached to a model: where, how many parameters, how many bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from inlay.engine.adapters import adapters_of, base_model
from inlay.engine.composition import names_in
from inlay.engine.host import CHILD


@dataclasses.dataclass(frozen=True)
class Row:
    """The pieces of one method of one adapter."""

    adapter: str
    method: str
    places: int
    examples: tuple[str, ...]
    parameters: int
    bytes: int
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """By place, for methods whose ranks change in training."""

    def __str__(self) -> str:
        every = sorted(self.ranks.values())
        ranks = f"   ranks {every[0]} to {every[-1]}, {sum(every)} in all" if every else ""
        return f"{', '.join(self.examples)}{ranks}"


@dataclasses.dataclass(frozen=True)
class Summary:
    """Counts in parameters and bytes; each tensor counts once, wherever it is shared."""

    rows: tuple[Row, ...]
    active: tuple[str, ...]
    trainable_parameters: int
    base_parameters: int
    added_parameters: int
    """Those that the model has more of than its base; a trained copy stands for a base parameter and adds none."""
    adapter_bytes: int

    @property
    def total_parameters(self) -> int:
        """Of the model as it runs: the base's and those that were added."""
        return self.base_parameters + self.added_parameters

    def __str__(self) -> str:
        widths = [max(len(row.adapter) for row in self.rows), max(len(row.method) for row in self.rows)]
        lines = [
            f"{row.adapter:<{widths[0]}}  {row.method:<{widths[1]}}  {row.places:>4} places  "
            f"{row.parameters:>12,} parameters  {row.bytes:>13,} bytes   {row}"
            for row in self.rows
        ]
        share = self.trainable_parameters / self.total_parameters if self.total_parameters else 0.0
        lines.append(f"active: {', '.join(self.active) or 'none (the base model)'}")
        lines.append(f"trainable: {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.3%})")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Count what is attached. Raises AdapterError when nothing is."""
    adapters = adapters_of(model)
    model = base_model(model)
    rows = []
    for adapter in adapters.loaded.values():
        for method, placed in zip(adapter.methods, adapter.placed, strict=True):
            own = {id(p): p for _, piece in placed for p in piece.parameters()}.values()
            names = list(dict.fromkeys(site.name or type(model).__name__ for site, _ in placed))
            examples = tuple(names[:2] + (["…"] if len(names) > 2 else []))
            count = sum(p.numel() for p in own)
            ranks = {site.name: rank for site, piece in placed if (rank := piece.current_rank) is not None}
            size = sum(p.nbytes for p in own)
            rows.append(Row(adapter.name, method.kind, len(names), examples, count, size, ranks))
    parameters = dict(model.named_parameters())
    base = sum(p.numel() for name, p in parameters.items() if CHILD not in name.split("."))
    pieces = [piece for adapter in adapters.loaded.values() for _, piece in adapter.pieces()]
    copied = {id(p) for piece in pieces if piece.replaces for p in piece.parameters()}
    added = [p for name, p in parameters.items() if CHILD in name.split(".")]
    return Summary(
        rows=tuple(rows),
        active=names_in(adapters.state.active),
        trainable_parameters=sum(p.numel() for p in parameters.values() if p.requires_grad),
        base_parameters=base,
        added_parameters=sum(p.numel() for p in added if id(p) not in copied),
        adapter_bytes=sum(p.nbytes for p in added),
    )
