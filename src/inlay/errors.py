"""Everything Inlay raises on purpose, in one tree.

    InlayError
    ├── TargetError        a target, layer or override that matches nothing in the model
    ├── ConfigError        a field, value, name or size that cannot be used
    ├── AdapterError       an adapter that is not loaded, is loaded already, or is merged
    ├── UnsupportedError   a method and a place that do not go together
    ├── CheckpointError    a file that is missing, damaged, unsafe or not what it says
    │   └── BaseModelError a file made for another base model
    ├── DataError          rows, columns, labels, texts
    ├── TrainingError      a run that cannot go on (NaN loss, no complete checkpoint to resume)
    └── MissingExtraError  an optional library that is not installed

Each message restates what was asked, says what was found, and ends with the fix. The command prints the message
alone and exits with code 2; anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InlayError(Exception):
    """Base of every error that a user can cause and mend."""


class TargetError(InlayError):
    """A target, layer or override matches nothing in the model."""


class ConfigError(InlayError):
    """A field, value, name or size cannot be used."""


class AdapterError(InlayError):
    """An adapter is not loaded, is loaded already, or is merged."""


class UnsupportedError(InlayError):
    """A method and a place do not go together."""


class CheckpointError(InlayError):
    """A file is missing, damaged, unsafe, or not what it says it is."""


class BaseModelError(CheckpointError):
    """A checkpoint was made for another base model."""


class DataError(InlayError):
    """Rows, columns, labels or texts that cannot be used."""


class TrainingError(InlayError):
    """A run cannot go on."""


class MissingExtraError(InlayError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {library}, which is not installed: pip install 'inlay[{extra}]'")


def nearest(word: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The `count` options most like `word`, best first (possibly none)."""
    spelled: dict[str, list[str]] = {}
    for option in dict.fromkeys(options):
        spelled.setdefault(option.lower(), []).append(option)
    found = difflib.get_close_matches(word.lower(), spelled, n=count, cutoff=0.4)
    return [option for one in found for option in spelled[one]][:count]


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A clause naming the nearest options: "; did you mean 'query' or 'key'?", or nothing."""
    found = nearest(word, options)
    if not found:
        return ""
    return "; did you mean " + " or ".join(repr(name) for name in found) + "?"
