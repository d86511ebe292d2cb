"""Ask each example in one of several ways, drawn anew at each training step: T-Few's templates.

The draw depends on the step's generator alone, so that a run from the same seed asks the same. Outside training there
is nothing to draw from: the answer is then the mean over all ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.prompts.encoding import Encoded
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.scorers.choice import ChoiceScorer
from inlay.fewshot.scorers.scorer import Batch, Demonstration, Scorer


@dataclasses.dataclass(frozen=True)
class Ways(Encoded):
    """A row in all the ways that it can be asked."""

    ways: tuple[Encoded, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnScorer(Scorer):
    """Choice scorers that differ in their templates. Raises ConfigError where they differ in what they choose from."""

    auto: Literal["causal-lm", "seq2seq"] = "causal-lm"  # type: ignore[misc]  # as the scorers say
    scorers: tuple[ChoiceScorer, ...]

    def __post_init__(self) -> None:
        first = self.scorers[0]
        for name in ("verbalizer", "auto", "direction", "length_norm"):
            values = [getattr(other, name) for other in self.scorers]
            if any(value != values[0] for value in values):
                raise ConfigError(
                    f"templates that are drawn from differ in their text alone, and these scorers have several {name}: "
                    f"{', '.join(map(str, values))}"
                )
        object.__setattr__(self, "auto", first.auto)

    @classmethod
    def of(cls, scorers: Sequence[ChoiceScorer]) -> Self:
        """From scorers of several templates. Raises ConfigError where there is none."""
        if not scorers:
            raise ConfigError("there is no template to draw from: give at least one")
        first = scorers[0]
        return cls(
            tokenizer=first.tokenizer, template=first.template, max_length=first.max_length, scorers=tuple(scorers)
        )

    @property
    @override
    def labels(self) -> tuple[str, ...]:
        return self.scorers[0].labels

    @override
    def encode(
        self, rows: Sequence[Row], demonstrations: Sequence[Sequence[Demonstration]] | None = None
    ) -> list[Encoded]:
        each = [scorer.encode(rows, demonstrations) for scorer in self.scorers]
        return [Ways(max(ways, key=len).ids, ways=ways) for ways in zip(*each, strict=True)]

    @override
    def draw(self, encoded: Sequence[Encoded], generator: torch.Generator) -> list[Encoded]:
        drawn = torch.randint(len(self.scorers), (len(encoded),), generator=generator).tolist()
        return [row.ways[way] for row, way in zip(encoded, drawn, strict=True) if isinstance(row, Ways)]

    @override
    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """A batch as the choice scorers'; rows that were not drawn stand in it once for each way."""
        batch = self.scorers[0].collate(
            [way for row in encoded for way in (row.ways if isinstance(row, Ways) else (row,))]
        )
        return {**batch, "ways": torch.tensor(len(self.scorers) if isinstance(encoded[0], Ways) else 1)}

    @override
    def __call__(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        found = self.scorers[0](model, batch)
        return found.reshape(-1, int(batch["ways"]), len(self.labels)).mean(1)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"kind": "drawn", "scorers": [scorer.to_dict() for scorer in self.scorers]}

    @override
    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Self:
        return cls.of([ChoiceScorer.from_dict(entry, tokenizer) for entry in fields["scorers"]])
