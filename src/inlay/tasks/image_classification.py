"""Image classification: an image to one label, several labels, or a number (`classification.py` says which).

A row names an image file, relative to the data file, or holds its pixels. Files are read as the batches need them, so
that a data set may be larger than memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from datasets import Dataset, Image
from transformers import AutoModelForImageClassification, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import ConfigError
from inlay.tasks.classification import Classification
from inlay.tasks.columns import IMAGE
from inlay.tasks.loading import check_trial
from inlay.tasks.media import guess_media, media, named_rows
from inlay.tasks.pictures import MODES, Pictures, check_pictures, load_processor, need_pillow
from inlay.tasks.task import Batch, Collator, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageClassification(Classification):
    """An image to a label. Roles: image, label."""

    kind: ClassVar[str] = "image-classification"
    roles: ClassVar[tuple[str, ...]] = ("image", "label")

    @override
    def guess(self, rows: Dataset) -> dict[str, str]:
        return guess_media(rows, self.columns, "image", IMAGE, Image)

    @override
    def complete(self, splits: Mapping[str, Dataset]) -> Self:
        if self.max_length != Task.max_length:
            raise ConfigError(f"{self.kind} has no max_length: the model's image processor decides an image's size")
        return super().complete(splits)

    @override
    def auto(self) -> Any:
        return AutoModelForImageClassification

    @override
    def load_tokenizer(self, model: str | Path) -> Any:
        """The model's image processor, which stands where a tokenizer does."""
        return load_processor(model)

    @override
    def check(self, rows: Dataset) -> None:
        need_pillow(self.kind)
        check_pictures(rows, media(rows, self.column("image"), "image"))

    @override
    def given(self, rows: Dataset) -> list[dict[str, Any]]:
        return named_rows(rows, self.column("image"), "image")

    @override
    def inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        found = media(rows, self.column("image"), "image")
        check_pictures(rows, found)
        return found

    @override
    def check_fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        check_trial(self.auto(), model, self.probe(model, tokenizer), "images as its image processor makes them")

    @override
    def batcher(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
        channels = getattr(model.config, "num_channels", 3)
        if channels not in MODES:
            raise ConfigError(f"this {model.config.model_type} model reads {channels} channels; images have 1, 3 or 4")
        return Pictures(tokenizer, MODES[channels], model.dtype)

    @override
    def probe(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Batch:
        noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3))
        return self.batcher(tokenizer, model)([{"image": image} for image in noise.tolist()])
