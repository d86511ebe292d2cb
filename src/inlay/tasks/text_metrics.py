"""Generated text against references: exact match, ROUGE (rouge-score) and BLEU (sacrebleu)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from inlay.errors import ConfigError, MissingExtraError, did_you_mean

EXTRA = "text-metrics"
_LIBRARIES = {"rouge": ("rouge_score", "rouge-score"), "bleu": ("sacrebleu", "sacrebleu")}
METRICS = ("exact_match", "rouge", "bleu")


def installed() -> tuple[str, ...]:
    """The metrics that can be computed here."""
    return tuple(name for name in METRICS if name not in _LIBRARIES or importlib.util.find_spec(_LIBRARIES[name][0]))


def check(metrics: Sequence[str]) -> None:
    """Raise ConfigError for a metric that does not exist, MissingExtraError for one whose library is not installed."""
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(
                f"there is no text metric {name!r}{did_you_mean(name, METRICS)}; metrics: {', '.join(METRICS)}"
            )
        if name not in installed():
            raise MissingExtraError(_LIBRARIES[name][1], EXTRA, f"the metric {name}")


def text_scores(
    metrics: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The chosen metrics of predictions against one or more references each.

    exact_match in [0, 1], white space at the ends aside; rouge1, rouge2 and rougeL are mean F-measures in [0, 1], the
    best reference of each row counting (Lin 2004; words of a–z and 0–9 only, so of little use outside English); bleu is
    sacrebleu's corpus BLEU in [0, 100] (Post 2018).
    """
    check(metrics)
    scores: dict[str, float] = {}
    pairs = list(zip(predictions, references, strict=True))
    if "exact_match" in metrics:
        hits = [any(text.strip() == reference.strip() for reference in several) for text, several in pairs]
        scores["exact_match"] = sum(hits) / len(hits)
    if "rouge" in metrics:
        scores |= _rouge(pairs)
    if "bleu" in metrics:
        scores["bleu"] = _bleu(predictions, references)
    return scores


def _rouge(pairs: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names), use_stemmer=False)
    rows = [scorer.score_multi(list(several), text) for text, several in pairs]
    return {name: sum(row[name].fmeasure for row in rows) / len(rows) for name in names}


def _bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    from sacrebleu import corpus_bleu

    most = max(len(several) for several in references)
    streams: list[list[Any]] = [
        [several[index] if index < len(several) else None for several in references] for index in range(most)
    ]
    return float(corpus_bleu(list(predictions), streams).score)
