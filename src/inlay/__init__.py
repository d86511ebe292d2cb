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
    "prompt_similarity": "inlay.combining.prompts",
    "nearest_prompts": "inlay.combining.prompts",
    "AdapterDrop": "inlay.combining.composition",
    "Average": "inlay.combining.composition",
    "BatchSplit": "inlay.combining.composition",
    "Fuse": "inlay.combining.composition",
    "Parallel": "inlay.combining.composition",
    "Split": "inlay.combining.composition",
    "Stack": "inlay.combining.composition",
    "for_tasks": "inlay.pieces.prompts.tasks",
    "fuse": "inlay.pieces.fusing",
    "select": "inlay.pieces.subsets.selection",
    "Subset": "inlay.pieces.subsets.subset",
    "split_base": "inlay.pieces.lora.quantised_start",
    "pack": "inlay.kernels.packed",
    "per_row": "inlay.engine.bank",
    "switchable": "inlay.engine.bank",
    "weigh": "inlay.engine.bank",
    "hot_swap": "inlay.engine.hot_swap",
    "lora_plus": "inlay.train.companions.lora_plus",
    "riemannian": "inlay.train.companions.riemannian",
    "galore": "inlay.train.companions.galore",
    "warmup_stable_decay_constant": "inlay.train.schedules",
    "density": "inlay.pieces.density.measured",
    "reconstruction_error": "inlay.pieces.reversible.reconstruction",
    "standalone_shadow": "inlay.pieces.shadow.standalone",
    "summary": "inlay.engine.summary",
    "save": "inlay.engine.checkpoint",
    "load": "inlay.engine.checkpoint",
    "replicate_layers": "inlay.engine.replication",
    "restore_layers": "inlay.engine.replication",
    "trim_vocabulary": "inlay.tasks.vocabulary",
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
