"""Text classification: one text or two to one label, several labels, or a number (`classification.py` says which)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.tasks import columns as named_columns
from inlay.tasks.batches import length_limit, padder
from inlay.tasks.classification import Classification
from inlay.tasks.columns import parts, texts
from inlay.tasks.task import Collator


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassification(Classification):
    """One text, or a pair, to a label. Roles: text, text_pair, label."""

    kind: ClassVar[str] = "text-classification"
    roles: ClassVar[tuple[str, ...]] = ("text", "text_pair", "label")

    @override
    def guess(self, rows: Dataset) -> dict[str, str]:
        found = dict(self.columns)
        lower = {name.lower(): name for name in reversed(rows.column_names)}
        if "text" not in found and "text_pair" not in found:
            for first, second in named_columns.PAIRS:
                if first in lower and second in lower and lower[second] not in found.values():
                    found |= {"text": lower[first], "text_pair": lower[second]}
                    break
        taken = [part for column in found.values() for part in parts(rows, column)]
        if "label" not in found:
            label = named_columns.named(rows, named_columns.LABEL, without=taken)
            if label is not None:
                found["label"] = label
                taken.append(label)
        if "text" not in found:
            found["text"] = named_columns.guess_text(rows, without=taken)
            taken.append(found["text"])
        if "label" not in found:
            left = named_columns.other_columns(rows, without=taken)
            if len(left) != 1:
                raise named_columns.cannot_guess(rows, "label")
            found["label"] = left[0]
        return {role: found[role] for role in self.roles if role in found}

    @override
    def auto(self) -> Any:
        return AutoModelForSequenceClassification

    def _texts(self, rows: Dataset) -> list[list[str]]:
        roles = [role for role in ("text", "text_pair") if role in self.columns or role == "text"]
        return [texts(rows, self.column(role), role) for role in roles]

    @override
    def given(self, rows: Dataset) -> list[dict[str, Any]]:
        columns = zip(*self._texts(rows), strict=True)
        return [dict(zip(("text", "text_pair"), cells, strict=False)) for cells in columns]

    @override
    def inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        limit = length_limit(tokenizer, self.max_length)
        return Dataset.from_dict(dict(tokenizer(*self._texts(rows), truncation=True, max_length=limit)))

    @override
    def batcher(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
        return padder(tokenizer, model)
