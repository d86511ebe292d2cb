"""Few-shot learning: ask a pretrained model, and train its answer on a few labels.

    from inlay.fewshot import FewShotRun, fewshot
    report = fewshot(FewShotRun(train="train.jsonl", test="test.jsonl", shots=16, templates=["{text} It was {mask}."],
                                verbalizer={"neg": "terrible", "pos": "great"}))

Data flows this way, and each folder's files are made of those before it:

    prompts/    rows -> templates, label words, demonstrations -> token ids
    scorers/    token ids -> a model's answer -> one score for each label
    learning/   scores -> objectives, the loop, pseudo-labels
    searches/   for label words and templates
    systems/    PET, LM-BFF, T-Few, …: one short file each
    run.py -> running.py -> report.py, saved.py     a run: described, run in stages, measured, used

Names are imported on first use.
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
    "Template": "prompts.template",
    "Verbalizer": "prompts.verbalizer",
    "MaskScorer": "scorers.mask",
    "HeadScorer": "scorers.head",
    "Recipe": "learning.fitting",
    "fit": "learning.fitting",
    "few_shot_split": "splits",
    "Base": "base",
    "Problem": "problem",
    "Labelled": "problem",
    "System": "problem",
    "Stages": "stages",
    "MultiMaskScorer": "scorers.multi_mask",
    "ChoiceScorer": "scorers.choice",
    "CrossEntropy": "learning.objectives",
    "Distillation": "learning.objectives",
    "Hinge": "learning.objectives",
    "Interval": "learning.objectives",
    "find_words": "searches.word_search",
    "search_words": "searches.word_search",
    "search_labels": "searches.label_search",
    "search_templates": "searches.template_search",
    "Demonstrations": "prompts.demonstrations",
    "embedded_model": "embedded",
}

__all__ = sorted(_PLACES)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        from inlay.errors import did_you_mean

        raise AttributeError(f"module 'inlay.fewshot' has no attribute {name!r}{did_you_mean(name, _PLACES)}")
    return getattr(importlib.import_module(f"inlay.fewshot.{_PLACES[name]}"), name)
