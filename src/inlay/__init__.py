"""Inlay: parameter-efficient and few-shot fine-tuning, measured rather than claimed.

The public names and nothing else, each imported on first use: `import inlay` costs no torch. Verbs of the engine are
listed here; methods (`inlay.LoRA`, …) are found in `inlay/methods`, one file each.
"""

from __future__ import annotations

import importlib
from typing import Any

from inlay.engine.catalogue import classes

_PLACES = {
    "attach": "inlay.engine.adapters",
    "detach": "inlay.engine.adapters",
    "activate": "inlay.engine.adapters",
    "active": "inlay.engine.adapters",
    "using": "inlay.engine.adapters",
    "disabled": "inlay.engine.adapters",
    "trainable": "inlay.engine.adapters",
    "controllers": "inlay.engine.adapters",
    "merge": "inlay.engine.adapters",
    "unmerge": "inlay.engine.adapters",
    "combine": "inlay.combining.adapters",
    "to_lora": "inlay.combining.adapters",
    "fuse": "inlay.pieces.fusing",
    "pack": "inlay.kernels.packed",
    "per_row": "inlay.engine.bank",
    "switchable": "inlay.engine.bank",
    "weigh": "inlay.engine.bank",
    "hot_swap": "inlay.engine.hot_swap",
    "summary": "inlay.engine.summary",
    "save": "inlay.engine.checkpoint",
    "load": "inlay.engine.checkpoint",
    "Method": "inlay.engine.piece",
    "Piece": "inlay.engine.piece",
    "Controller": "inlay.engine.controller",
    "Site": "inlay.engine.sites",
    "SiteIndex": "inlay.engine.sites",
    "InlayError": "inlay.errors",
}


def __getattr__(name: str) -> Any:
    module = _PLACES.get(name) or classes().get(name)
    if module is None:
        from inlay.errors import did_you_mean

        raise AttributeError(f"module 'inlay' has no attribute {name!r}{did_you_mean(name, __all__)}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = sorted([*_PLACES, *classes()])  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]
