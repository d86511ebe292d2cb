"""Recordings as a model's feature extractor wants them: from WAV files, their bytes, or lists of samples."""

from __future__ import annotations

import dataclasses
import inspect
import wave
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoFeatureExtractor

from inlay.errors import ConfigError, DataError
from inlay.tasks.data import place
from inlay.tasks.loading import quiet
from inlay.tasks.media import beside, read, shown

FILES = ("preprocessor_config.json", "processor_config.json")


def load_extractor(model: str | Path) -> Any:
    """The feature extractor kept with a model. Raises ConfigError where there is none, or none of sounds."""
    path = Path(model).expanduser()
    advice = "a model of sounds has one, which says how they are to be sampled: write it with save_pretrained(…)"
    if path.is_dir() and not any((path / name).is_file() for name in FILES):
        raise ConfigError(f"{model} has no preprocessor_config.json; {advice}")
    try:
        with quiet():
            found: Any = AutoFeatureExtractor.from_pretrained(str(path))  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers raises a different class for nearly every cause
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"no feature extractor can be loaded from {model}: {reason}; {advice}") from error
    if not isinstance(getattr(found, "sampling_rate", None), int):
        raise ConfigError(f"{model} has a {type(found).__name__}, which reads no sounds; {advice}")
    return found


def check_sounds(rows: Dataset, cells: Dataset) -> None:
    """Raise DataError for the first row (of column "audio" in `cells`) that is no recording, judged by its header."""
    for index, row in enumerate(cells):
        try:
            samples_of(row["audio"], 1, seconds=0)
        except DataError as error:
            raise DataError(f"{place(rows, index)}: {error}") from error.__cause__


def samples_of(cell: Any, rate: int, *, seconds: float) -> np.ndarray:
    """The first `seconds` of a recording at `rate` samples a second, its channels averaged, between -1 and 1."""
    if isinstance(cell, list):
        found = np.array(cell) if cell and not isinstance(cell[0], list) else np.zeros(0)
        if found.size == 0 or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
            raise DataError("its samples are no list of numbers; at least one, all finite, is needed")
        return found[: max(1, round(seconds * rate))].astype(np.float32)

    def reader(stream: BinaryIO) -> tuple[np.ndarray, int]:
        with wave.open(stream, "rb") as file:
            here, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            if file.getnframes() == 0:
                raise DataError(f"{shown(cell)} is a recording without samples")
            raw = file.readframes(min(file.getnframes(), max(1, round(seconds * here))))
        return _numbers(raw[: len(raw) // (width * channels) * width * channels], width).reshape(-1, channels), here

    try:
        found, here = read(cell, reader)
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(f"{shown(cell)} is no WAV file of plain (PCM) samples ({error}): convert it to one") from error
    if found.size == 0:
        raise DataError(f"{shown(cell)} is cut off before its first sample: fetch or write it again")
    return resampled(found.mean(axis=1), here, rate)


def _numbers(raw: bytes, width: int) -> np.ndarray:
    """Samples of 1 to 4 bytes as numbers from -1 to 1; those of one byte have no sign."""
    if width == 1:
        return np.frombuffer(raw, np.uint8) / 128 - 1
    bytes_ = np.frombuffer(raw, np.uint8).reshape(-1, width)
    wide = np.zeros((len(bytes_), 4), np.uint8)
    wide[:, 4 - width :] = bytes_  # the upper bytes of a number of 32 bits
    return wide.view("<i4")[:, 0] / 2**31


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """The same sound at another rate: its spectrum cut, or continued with zeros."""
    if rate == wanted:
        return samples.astype(np.float32)
    count = max(1, round(len(samples) * wanted / rate))
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    slower = min(count, len(samples))
    if slower % 2 == 0:  # its highest tone stands once in its spectrum, and with its mirror image in the other's
        spectrum[slower // 2] *= 0.5 if count > slower else 2
    return (np.fft.irfft(spectrum, count) * (count / len(samples))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Sounds:
    """Collator: recordings read, cut, resampled, and put through the feature extractor; labels beside them."""

    extractor: Any
    seconds: float
    dtype: torch.dtype
    """Of the features, which is the model's."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """What the model takes, and what else the rows have, such as labels."""
        rate = self.extractor.sampling_rate
        sounds = [samples_of(row["audio"], rate, seconds=self.seconds) for row in rows]
        usual = inspect.signature(type(self.extractor).__call__).parameters.get("padding")
        padding = {"padding": True} if usual is not None and usual.default is False else {}
        batch = dict(self.extractor(sounds, sampling_rate=rate, return_tensors="pt", **padding))
        batch = {name: cell.to(self.dtype) if cell.is_floating_point() else cell for name, cell in batch.items()}
        return batch | beside(rows, "audio")
