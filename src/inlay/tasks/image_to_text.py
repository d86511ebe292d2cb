"""Image to text: features of an image, and a text or none, to a target text, by an encoder–decoder (`visual.py`).

Captions and questions about images. The features are computed once, beforehand, by whatever reads images (a CLIP's
grid, say); what is trained is the language model's adapter and a projection of the features to its width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import ConfigError
from inlay.tasks import columns as named_columns
from inlay.tasks.batches import length_limit
from inlay.tasks.loading import load_pretrained
from inlay.tasks.media import named_rows
from inlay.tasks.prompts import prompts
from inlay.tasks.seq2seq import Seq2Seq
from inlay.tasks.task import Batch, Collator
from inlay.tasks.visual import PREFIX, AutoReadingImages, WithVisual, check_features


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageToText(Seq2Seq):
    """Features of images, and sources, to targets."""

    kind: ClassVar[str] = "image-to-text"
    roles: ClassVar[tuple[str, ...]] = ("features", *Seq2Seq.roles)

    max_length: int = 128
    """Tokens of a source at most, special tokens included; the features come on top."""
    visual_tokens: int = 0
    """Features of a row; 0: as many as the training rows have."""
    visual_size: int = 0
    """Numbers in a feature; 0: as the training rows have it."""

    # -- from the data -----------------------------------------------------------------------------------------------

    @override
    def guess(self, rows: Dataset) -> dict[str, str]:
        found = self.columns.get("features") or named_columns.named(rows, named_columns.FEATURES)
        if found is None:
            raise named_columns.cannot_guess(rows, "features")
        given = {role: column for role, column in self.columns.items() if role != "features"}
        if self._fixed(rows):  # a caption needs no column of sources
            target = given.get("target") or named_columns.named(rows, named_columns.TARGET, without=[found])
            if target is None:
                raise named_columns.cannot_guess(rows, "target")
            return {"features": found, **given, "target": target}
        text = dataclasses.replace(self, columns=given)
        return {"features": found, **super(ImageToText, text).guess(rows)}

    def _fixed(self, rows: Dataset) -> bool:
        """Whether the template says what the source is, without a column of sources or instructions."""
        fields = ("{source}", "{instruction}", "{input}")
        return self.prompt_template is not None and not any(field in self.prompt_template for field in fields)

    @override
    def complete(self, splits: Mapping[str, Dataset]) -> Self:
        task = super().complete(splits)
        shape = (self.visual_tokens, self.visual_size)
        for rows in splits.values():
            shape, _ = check_features(rows, self.column("features"), shape)
        return dataclasses.replace(task, visual_tokens=shape[0], visual_size=shape[1])

    @override
    def details(self) -> str:
        return f"features: {self.visual_tokens} × {self.visual_size}; {super().details()}"

    @override
    def _sources(self, rows: Dataset) -> list[str]:
        if self._fixed(rows):
            return prompts(rows, self.columns, self.prompt_template or "")
        return super()._sources(rows)

    # -- the model ---------------------------------------------------------------------------------------------------

    @override
    def load_model(self, model: str | Path, **kwargs: Any) -> PreTrainedModel:
        if self.visual_size < 1:
            raise ConfigError(f"{self.kind} does not know its features yet: call resolve(splits) first")
        loaded = load_pretrained(AutoReadingImages(self.visual_size), model, purpose=self.kind, new_head=True, **kwargs)
        lacking = [name for name in loaded.fresh_parameters if not name.startswith(f"{PREFIX}.")]  # type: ignore[union-attr]
        if lacking:
            raise ConfigError(
                f"{model} ({loaded.config.model_type}) cannot do {self.kind}: {lacking[0]} and {len(lacking) - 1} more "
                "tensors are not in its file"
            )
        return loaded

    @override
    def check_fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().check_fit(model, tokenizer)
        positions = getattr(model.config, "max_position_embeddings", None)
        longest = length_limit(tokenizer, self.max_length)
        if isinstance(positions, int) and 0 < positions < longest + self.visual_tokens:
            raise ConfigError(
                f"{self.visual_tokens} features and max_length={longest} tokens are more than the {positions} "
                f"positions of this {model.config.model_type} model: "
                f"set task.max_length={positions - self.visual_tokens} or less"
            )

    # -- rows to batches to results ----------------------------------------------------------------------------------

    @override
    def beside(self, rows: Dataset) -> list[dict[str, Any]]:
        _, cells = check_features(rows, self.column("features"), (self.visual_tokens, self.visual_size))
        return list(cells)

    @override
    def wrap(self, model: PreTrainedModel) -> Callable[[Collator], Collator]:
        return lambda text: WithVisual(text, model.dtype)

    @override
    def answers(self, rows: Dataset, through: Any) -> list[dict[str, Any]]:
        """{"features" or "row", "source", "generation"} a row."""
        names: Sequence[dict[str, Any]] = named_rows(rows, self.column("features"), "features")
        return [name | row for name, row in zip(names, super().answers(rows, through), strict=True)]

    @override
    def probe(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Batch:
        noise = np.random.default_rng(0).normal(size=(3, self.visual_tokens, self.visual_size)).tolist()
        texts = tokenizer(["What is there to be seen?", "no", "How many of them are red?"])
        rows = [{"visual": cell, "input_ids": ids, "attention_mask": [1] * len(ids)}
                for cell, ids in zip(noise, texts["input_ids"], strict=True)]  # fmt: skip
        return self.batcher(tokenizer, model)(rows)
