"""Demonstrations: one labelled row of each class beside the query, its mask filled in with its label's word.

    T(x) ⊕ T(x_1, y_1) ⊕ … ⊕ T(x_C, y_C)      x_c: a row of class c, drawn from those that are most like x

In training they are drawn anew at every step, and no row is its own demonstration. For inference there are `sets` of
them, over which the scores are averaged. With `keep` below 1 a class is first cut down to the ⌈keep · n_c⌉ rows whose
vectors have the largest cosine with the query's, so that each query has sets of its own; at 1 all queries share them.

Gao et al. 2021, "Making Pre-trained Language Models Better Few-shot Learners", arXiv:2012.15723, section 6.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from inlay.engine.adapters import disabled, find_adapters
from inlay.errors import CheckpointError, ConfigError, DataError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.seeds import derived
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.scorers.scorer import Demonstration
from inlay.tasks.batches import evaluating

Embedder = Callable[[Sequence[str]], Tensor]
"""Texts -> their vectors (texts, width)."""
Order = Literal["label", "random"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Draws demonstrations from labelled rows. DataError when a label has no row, ConfigError for wrong numbers."""

    rows: Sequence[Row]
    labels: Sequence[str]
    """The rows' labels."""
    names: Sequence[str]
    """All labels: one demonstration of each, in this order."""
    columns: Sequence[str] = ()
    """What of a row an embedder reads, parted by spaces."""
    keep: float = 1.0
    """The share of each class, the nearest to the query, that is drawn from; 1: all of it, without an embedder."""
    sets: int = 16
    """How many are drawn for inference."""
    order: Order = "label"
    """Whether they stand in the order of the labels, or each time in another."""
    seed: int = 0
    embed: Embedder | None = None
    """What makes vectors of texts; None: the mean of the base's own last hidden states."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep={self.keep!r}: a share of each class, above 0 and up to 1, is needed")
        if isinstance(self.sets, bool) or not isinstance(self.sets, int) or self.sets < 1:
            raise ConfigError(f"sets={self.sets!r}: a whole number of at least 1 is needed")
        if self.order not in ("label", "random"):
            raise ConfigError(f"order={self.order!r}: demonstrations stand in the order 'label' or 'random'")
        if self.keep < 1 and not self.columns:
            raise ConfigError(f"keep={self.keep!r} compares rows by their texts: say which columns")
        for name, numbers in self._classes.items():
            if not numbers:
                raise DataError(f"one demonstration of each label is shown, and {name!r} has no row: give one")

    @functools.cached_property
    def _classes(self) -> dict[str, list[int]]:
        return {
            name: [number for number, label in enumerate(self.labels) if label == name] for name in self.names
        }  # fmt: skip

    def demonstrator(self, base: Base) -> Callable[[Sequence[int], torch.Generator], list[list[Demonstration]]]:
        """What `fit` asks at each step: (row numbers, what to draw from) -> demonstrations for each of these rows.

        Raises DataError when a label has one row alone, which would have to be its own demonstration.
        """
        for name, numbers in self._classes.items():
            if len(numbers) < 2:
                raise DataError(
                    f"no row is its own demonstration, and {name!r} has one row alone: give two of each label, or "
                    "train without demonstrations"
                )
        likeness = self._likeness(base, self.rows)

        def drawn(chosen: Sequence[int], generator: torch.Generator) -> list[list[Demonstration]]:
            return [
                self._drawn(self.nearest(None if likeness is None else likeness[row], without=row), generator)
                for row in chosen
            ]

        return drawn

    def fixed(self) -> list[list[Demonstration]]:
        """The sets that all queries share."""
        generator = torch.Generator().manual_seed(derived(self.seed, "demonstrations"))
        return [self._drawn(list(self._classes.values()), generator) for _ in range(self.sets)]

    def for_queries(self) -> list[list[Demonstration]] | Self:
        """What a predictor holds: the sets, or, where each query has its own, what draws them."""
        return self.fixed() if self.keep == 1 else self

    def shown(self, base: Base, queries: Sequence[Row]) -> list[list[list[Demonstration]]]:
        """For each set the demonstrations of each query; a query's depend on itself and the seed alone."""
        likeness = self._likeness(base, queries)
        if likeness is None:
            return [[shared] * len(queries) for shared in self.fixed()]
        by_query = []
        for row, similar in zip(queries, likeness, strict=True):
            generator = torch.Generator().manual_seed(derived(self.seed, "demonstrations", self._text(row)))
            pools = self.nearest(similar)
            by_query.append([self._drawn(pools, generator) for _ in range(self.sets)])
        return [[own[number] for own in by_query] for number in range(self.sets)]

    def nearest(self, likeness: Tensor | None, without: int | None = None) -> list[list[int]]:
        """Of each class the numbers of the ⌈keep · n⌉ rows that are most alike (rows,), nearest first.

        Row number `without` is left out, and not counted in n. Ties, cosines that agree to five decimals: the earlier
        row, so that the rounding of another batch, or another order of summing, changes nothing. None: all is kept.
        """
        pools = [[number for number in numbers if number != without] for numbers in self._classes.values()]
        if likeness is None:
            return pools
        values = [round(value, 5) for value in likeness.tolist()]
        return [
            sorted(pool, key=lambda number: -values[number])[: math.ceil(self.keep * len(pool) - 1e-9)]
            for pool in pools
        ]

    def _drawn(self, pools: Sequence[Sequence[int]], generator: torch.Generator) -> list[Demonstration]:
        chosen = [pool[int(torch.randint(len(pool), (), generator=generator))] for pool in pools]
        if self.order == "random":
            chosen = [chosen[place] for place in torch.randperm(len(chosen), generator=generator).tolist()]
        return [(self.rows[number], self.labels[number]) for number in chosen]

    def _text(self, row: Row) -> str:
        return " ".join(str(row[column]) for column in self.columns if row.get(column) is not None)

    def _likeness(self, base: Base, queries: Sequence[Row]) -> Tensor | None:
        """Cosines (queries, rows); None when nothing is left out by them."""
        if self.keep == 1:
            return None
        embed = self.embed or BodyEmbedder(base)
        own, others = (
            functional.normalize(embed([self._text(row) for row in rows]).float(), dim=-1)
            for rows in (queries, self.rows)
        )
        return own @ others.T

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it. Raises CheckpointError for an embedder of the caller's own, which a file cannot hold."""
        if self.embed is not None:
            raise CheckpointError(
                "demonstrations that are chosen by an embedder of your own cannot be saved: leave embed out, and the "
                "base's own states are compared"
            )
        fields = {name: list(getattr(self, name)) for name in ("labels", "names", "columns")}
        return {"rows": [dict(row) for row in self.rows], **fields, **self.settings()}

    def settings(self) -> dict[str, Any]:
        """How they are drawn, without the rows."""
        return {name: getattr(self, name) for name in ("keep", "sets", "order", "seed")}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Read `to_dict`'s result."""
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class BodyEmbedder:
    """Texts as the mean of the base's last hidden states over their tokens, (texts, hidden); no adapter is heard."""

    base: Base
    auto: str = "masked-lm"
    """Which form of the base, so that no other is loaded."""
    max_length: int = 128
    batch_size: int = 64

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The vectors, float32 on the CPU."""
        model, tokenizer = self.base.model(self.auto), self.base.tokenizer
        body: Any = model.base_model
        device = next(model.parameters()).device
        alone = disabled(model) if find_adapters(model) is not None else contextlib.nullcontext()
        found = []
        with evaluating(model), alone:
            for start in range(0, len(texts), self.batch_size):
                read: Any = tokenizer(
                    list(texts[start : start + self.batch_size]), truncation=True, padding=True,
                    max_length=min(self.max_length, tokenizer.model_max_length), return_tensors="pt",
                )  # fmt: skip
                mask = read["attention_mask"].to(device)
                states = body(input_ids=read["input_ids"].to(device), attention_mask=mask)[0].float()
                weights = mask[..., None].float()
                found.append(((states * weights).sum(1) / weights.sum(1).clamp_min(1)).cpu())
        return torch.cat(found) if found else torch.empty(0, model.config.hidden_size)
