"""Few-shot learning: ask a pretrained model, and train its answer on a few labels.

    from inlay.fewshot import FewShotRun, fewshot
    report = fewshot(FewShotRun(train="train.jsonl", test="test.jsonl", shots=16, templates=["{text} It was {mask}."],
                                verbalizer={"neg": "terrible", "pos": "great"}))

Systems lie in `systems/`, one short file each; what they are made of lies here. Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "FewShotRun": "run",
    "fewshot": "running",
    "predict": "saved",
    "evaluate": "saved",
    "explain": "saved",
    "Report": "report",
    "Template": "template",
    "Verbalizer": "verbalizer",
    "MaskScorer": "scorers.mask",
    "HeadScorer": "scorers.head",
    "Recipe": "fitting",
    "fit": "fitting",
    "few_shot_split": "splits",
    "Base": "base",
    "Problem": "problem",
    "Labelled": "problem",
    "System": "problem",
    "Stages": "stages",
    "MultiMaskScorer": "scorers.multi_mask",
    "ChoiceScorer": "scorers.choice",
    "CrossEntropy": "objectives",
    "Distillation": "objectives",
    "Hinge": "objectives",
    "Interval": "objectives",
    "find_words": "word_search",
    "search_words": "word_search",
    "search_labels": "label_search",
    "search_templates": "template_search",
    "Demonstrations": "demonstrations",
    "embedded_model": "embedded",
}

__all__ = sorted(_PLACES)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        from inlay.errors import did_you_mean

        raise AttributeError(f"module 'inlay.fewshot' has no attribute {name!r}{did_you_mean(name, _PLACES)}")
    return getattr(importlib.import_module(f"inlay.fewshot.{_PLACES[name]}"), name)
