"""What every scorer is: rows to batches to one score for each label."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.fewshot.learning.objectives import CrossEntropy, Objective
from inlay.fewshot.prompts.encoding import Encoded
from inlay.fewshot.prompts.template import Row, Template
from inlay.tasks.batches import evaluating, pad_id

Demonstration = tuple[Row, str]
"""An example that is shown, and its label."""
Batch = dict[str, Tensor]

MODEL_INPUTS = ("input_ids", "attention_mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer(abc.ABC):
    """Asks a model about rows. `scores = scorer(model, scorer.collate(scorer.encode(rows)))`, (rows, labels).

    Scores are logits: their softmax over the labels are probabilities, and they have gradients.
    """

    auto: ClassVar[str]
    """Which of transformers' auto classes loads a model that can be asked so: masked-lm, causal-lm, seq2seq, head."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    max_length: int = 128
    """Tokens of an example at most."""

    @property
    @abc.abstractmethod
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the scores."""

    @abc.abstractmethod
    def encode(
        self, rows: Sequence[Row], demonstrations: Sequence[Sequence[Demonstration]] | None = None
    ) -> list[Encoded]:
        """Rows as token ids, each with its demonstrations, if there are any."""

    def draw(self, encoded: Sequence[Encoded], generator: torch.Generator) -> list[Encoded]:
        """What a training step asks about these rows; a scorer with several ways of asking draws one for each row."""
        return list(encoded)

    @abc.abstractmethod
    def __call__(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The scores of a batch on the model's device, (rows, labels)."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything but the tokenizer, as JSON can hold it; `kind` tells which scorer it is (`kinds.py`)."""

    @classmethod
    @abc.abstractmethod
    def from_dict(cls, fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Self:
        """The scorer that `to_dict` described."""

    def objective(self) -> Objective:
        """What it is trained with where nothing else is said."""
        return CrossEntropy()

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """A padded batch: input_ids, attention_mask, and masks (True where a mask stands), each (rows, tokens).

        A soft vector's id is the number of the tokenizer's tokens plus its own (`SoftSlots` embeds it, also where the
        embedding has more rows).
        """
        longest = max(len(row) for row in encoded)
        ids = torch.full((len(encoded), longest), pad_id(self.tokenizer))
        attention, masks = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for index, row in enumerate(encoded):
            ids[index, : len(row)] = torch.tensor(row.ids)
            attention[index, : len(row)] = 1
            masks[index, list(row.masks)] = True
            for place, number in row.slots:
                ids[index, place] = len(self.tokenizer) + number
        return {"input_ids": ids, "attention_mask": attention, "masks": masks}

    def scores(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        *,
        demonstrations: Sequence[Sequence[Demonstration]] | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """All rows' scores (rows, labels), in eval mode without gradients, as float32 on the CPU."""
        encoded = self.encode(rows, demonstrations)
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
        device = next(model.parameters()).device
        found = torch.empty(len(rows), len(self.labels))
        with evaluating(model):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = self.collate([encoded[index] for index in chosen])
                found[chosen] = self(model, on(device, batch)).float().cpu()
        return found


def on(device: torch.device, batch: Mapping[str, Tensor]) -> Batch:
    """The batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
