"""Ask a classification head: standard fine-tuning, P-tuning v2, and the classifier that PET distils into.

    s(· | x) = head(body(P(x)))

The template only says which columns stand where ("{text}", "{premise}{sep}{hypothesis}"); it has no mask.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.prompts.encoding import Encoded, Encoder
from inlay.fewshot.prompts.template import Row, Template
from inlay.fewshot.scorers.scorer import MODEL_INPUTS, Batch, Demonstration, Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadScorer(Scorer):
    """A sequence classifier with as many outputs as labels."""

    auto: ClassVar[str] = "head"

    names: tuple[str, ...]
    """The labels, in the order of the head's outputs."""

    def __post_init__(self) -> None:
        if any(part.kind == "mask" for part in self.template.parts):
            raise ConfigError(f"a classification head answers without a mask, and {self.template.source!r} has one")

    @property
    @override
    def labels(self) -> tuple[str, ...]:
        return self.names

    @functools.cached_property
    def encoder(self) -> Encoder:
        """From rendered examples to ids."""
        return Encoder(self.template, self.tokenizer, self.max_length)

    @override
    def encode(
        self, rows: Sequence[Row], demonstrations: Sequence[Sequence[Demonstration]] | None = None
    ) -> list[Encoded]:
        if demonstrations and any(demonstrations):
            raise ConfigError("a classification head takes no demonstrations")
        return self.encoder([self.template.render(row) for row in rows])

    @override
    def __call__(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        logits: Tensor = model(**{name: batch[name] for name in MODEL_INPUTS}).logits
        return logits.float()

    @override
    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "head",
            "template": self.template.source,
            "labels": list(self.names),
            "max_length": self.max_length,
        }

    @override
    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Self:
        return cls(
            tokenizer=tokenizer,
            template=Template(fields["template"]),
            names=tuple(fields["labels"]),
            max_length=fields["max_length"],
        )
