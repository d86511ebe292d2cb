"""The scorers by name, as the files of a finished run name them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from inlay.errors import CheckpointError
from inlay.fewshot.scorers.scorer import Scorer

KINDS = {
    "mask": "inlay.fewshot.scorers.mask.MaskScorer",
    "head": "inlay.fewshot.scorers.head.HeadScorer",
    "multi-mask": "inlay.fewshot.scorers.multi_mask.MultiMaskScorer",
    "choice": "inlay.fewshot.scorers.choice.ChoiceScorer",
    "drawn": "inlay.fewshot.scorers.drawn.DrawnScorer",
}


def scorer_from_dict(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """The scorer that `to_dict` described. Raises CheckpointError for a kind that nobody knows."""
    kind = fields.get("kind")
    if kind not in KINDS:
        raise CheckpointError(f"this result was made with a scorer {kind!r}; known: {', '.join(KINDS)}")
    module, _, name = KINDS[kind].rpartition(".")
    made: Scorer = getattr(importlib.import_module(module), name).from_dict(fields, tokenizer)
    return made
