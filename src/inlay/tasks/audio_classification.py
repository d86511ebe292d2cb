"""Audio classification: a recording to one label, several labels, or a number (`classification.py` says which).

A row names a WAV file, relative to the data file, or holds samples at the model's rate. Files are read as the batches
need them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from datasets import Audio, Dataset
from transformers import AutoModelForAudioClassification, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import ConfigError
from inlay.tasks.classification import Classification
from inlay.tasks.columns import AUDIO
from inlay.tasks.loading import check_trial
from inlay.tasks.media import guess_media, media, named_rows
from inlay.tasks.sounds import Sounds, check_sounds, load_extractor
from inlay.tasks.task import Batch, Collator, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioClassification(Classification):
    """A recording to a label. Roles: audio, label."""

    kind: ClassVar[str] = "audio-classification"
    roles: ClassVar[tuple[str, ...]] = ("audio", "label")

    max_seconds: float = 30.0
    """Seconds kept of a recording."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.max_seconds < math.inf:
            raise ConfigError(f"task {self.kind}: max_seconds must be more than 0 and finite, not {self.max_seconds}")

    @override
    def guess(self, rows: Dataset) -> dict[str, str]:
        return guess_media(rows, self.columns, "audio", AUDIO, Audio)

    @override
    def complete(self, splits: Mapping[str, Dataset]) -> Self:
        if self.max_length != Task.max_length:
            raise ConfigError(f"{self.kind} has no max_length: set task.max_seconds, the seconds kept of a recording")
        return super().complete(splits)

    @override
    def auto(self) -> Any:
        return AutoModelForAudioClassification

    @override
    def load_tokenizer(self, model: str | Path) -> Any:
        """The model's feature extractor, which stands where a tokenizer does."""
        return load_extractor(model)

    @override
    def check(self, rows: Dataset) -> None:
        check_sounds(rows, media(rows, self.column("audio"), "audio"))

    @override
    def given(self, rows: Dataset) -> list[dict[str, Any]]:
        return named_rows(rows, self.column("audio"), "audio")

    @override
    def inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        found = media(rows, self.column("audio"), "audio")
        check_sounds(rows, found)
        return found

    @override
    def check_fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        check_trial(self.auto(), model, self.probe(model, tokenizer), "sounds as its feature extractor makes them")

    @override
    def batcher(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
        return Sounds(tokenizer, self.max_seconds, model.dtype)

    @override
    def probe(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Batch:
        rate: int = tokenizer.sampling_rate
        noise = np.random.default_rng(0).normal(0, 0.1, (3, rate))  # a second
        return self.batcher(tokenizer, model)([{"audio": sound} for sound in noise.tolist()])
