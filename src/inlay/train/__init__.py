"""Runs: described by a `Run`, trained, kept in folders that describe themselves, and used afterwards.

`Run` costs no torch; the verbs are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from inlay.train.run import Data, Run

if TYPE_CHECKING:
    from inlay.train.checking import check
    from inlay.train.conversion import convert
    from inlay.train.demo import quickstart
    from inlay.train.inspect import methods, show
    from inlay.train.record import Record
    from inlay.train.training import Interrupted, train
    from inlay.train.trimming import trim
    from inlay.train.use import evaluate, merge, predict

_PLACES = {
    "train": "training",
    "Interrupted": "training",
    "evaluate": "use",
    "predict": "use",
    "merge": "use",
    "check": "checking",
    "show": "inspect",
    "methods": "inspect",
    "convert": "conversion",
    "quickstart": "demo",
    "trim": "trimming",
    "Record": "record",
}

__all__ = [
    "Data", "Interrupted", "Record", "Run", "check", "convert", "evaluate", "merge", "methods", "predict", "quickstart",
    "show", "train", "trim",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'inlay.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"inlay.train.{_PLACES[name]}"), name)
