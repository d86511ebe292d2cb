"""Why a few-shot model answers as it does: the prompt as it reads it, and its likeliest words at the mask."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from inlay.fewshot.base import Base
from inlay.fewshot.methods.restricted_head import restricted_to
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.prompts.encoding import Encoded
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.scorers.scorer import on
from inlay.tasks.batches import evaluating


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """One row, asked in one way."""

    prompt: str
    """What the model reads, its special tokens included."""
    label: str
    """The label that this way of asking chooses."""
    scores: Mapping[str, float]
    """The probability of each label."""
    words: Sequence[Sequence[tuple[str, float]]] = ()
    """For each mask the likeliest words, with their probabilities: of the whole vocabulary, or, where the adapter has a
    restricted head, of its words."""

    def __str__(self) -> str:
        lines = [self.prompt, "  " + ", ".join(f"{label} {score:.3f}" for label, score in self.scores.items())]
        lines += ["  mask: " + ", ".join(f"{word} {score:.3f}" for word, score in mask) for mask in self.words]
        return "\n".join(lines)


def explained(base: Base, solution: Solution, rows: Sequence[Row], *, top: int = 5) -> list[Explanation]:
    """Row by row, and for each row predictor by predictor."""
    found = [_asked(base, predictor, rows, top) for predictor in solution.predictors]
    return [explanations[index] for index in range(len(rows)) for explanations in found]


def _asked(base: Base, predictor: Predictor, rows: Sequence[Row], top: int) -> list[Explanation]:
    scorer, shown = predictor.scorer, predictor.shown(base, rows)[0]
    probabilities = predictor.scores(base, rows).softmax(-1)
    encoded = scorer.encode(rows, shown)
    words: list[list[list[tuple[str, float]]]] = [[] for _ in rows]
    if isinstance(scorer, MaskScorer):
        with predictor.holding(base) as model, evaluating(model):
            device, tokens = next(model.parameters()).device, restricted_to(model)
            for index, row in enumerate(encoded):
                logits = scorer.mask_logits(model, on(device, scorer.collate([row])))[0].float()
                best = logits.softmax(-1).topk(min(top, logits.shape[-1]))
                words[index] = [
                    [
                        (str(scorer.tokenizer.decode([column if tokens is None else tokens[column]])).strip(), score)
                        for column, score in zip(columns, scores, strict=True)
                    ]
                    for columns, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ]
    return [
        Explanation(
            prompt=_text(scorer.tokenizer, row),
            label=scorer.labels[int(torch.argmax(found))],
            scores=dict(zip(scorer.labels, found.tolist(), strict=True)),
            words=words[index],
        )
        for index, (row, found) in enumerate(zip(encoded, probabilities, strict=True))
    ]


def _text(tokenizer: PreTrainedTokenizerBase, row: Encoded) -> str:
    """What the tokens say; [soft] is a trained vector, for which some special token holds the place."""
    slots = {place for place, _ in row.slots}
    runs = [list(run) for _, run in itertools.groupby(range(len(row)), lambda place: place in slots)]
    parts = [
        " ".join("[soft]" for _ in run) if run[0] in slots else str(tokenizer.decode([row.ids[place] for place in run]))
        for run in runs
    ]
    return parts[0] if len(parts) == 1 else " ".join(part.strip() for part in parts)
