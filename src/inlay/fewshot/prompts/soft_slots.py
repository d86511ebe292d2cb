"""Who trains the soft slots of a template: `SoftSlots`, beside whatever else is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inlay.engine.piece import Method
from inlay.fewshot.methods.soft_slots import SoftSlots
from inlay.fewshot.prompts.encoding import Encoder
from inlay.fewshot.scorers.scorer import Scorer


def slots_of(scorer: Scorer, **options: Any) -> SoftSlots:
    """The vectors of a scorer's template, which start as its words where it names any; `options`: the encoder's."""
    words = Encoder(scorer.template, scorer.tokenizer, scorer.max_length).soft_words
    return SoftSlots(first=len(scorer.tokenizer), starts=[token for slot in words for token in slot], **options)


def with_slots(methods: Sequence[Method], scorer: Scorer) -> tuple[Method, ...]:
    """The methods, and `SoftSlots` where the template has slots and none of the methods trains them."""
    if not scorer.template.soft or any(isinstance(method, SoftSlots) for method in methods):
        return tuple(methods)
    return (*methods, slots_of(scorer))
