"""Which words should stand for the labels? Those that the model expects at the mask of this label's rows alone.

One label against the rest, n of its rows and m others, q(x) the probability of a word at the mask of x:

    llr    LLR_y(w) = 1/n Σ_{x in y} log q/(1 − q)  −  1/m Σ_{x not in y} log q/(1 − q)
    ce           = 1/n Σ_{x in y} log q  +  1/m Σ_{x not in y} log(1 − q)

which are the paper's sums, rare labels weighed up by m/n, divided by m, so that labels can be compared. Candidates are
words that are one token at the mask, the most frequent ones of unlabelled text; of these a label keeps the likeliest,
Σ_{x in y} log q, and takes the best. With several patterns scores are summed over them: one choice for all.

A word that is good for two labels goes to the one that it is better for, as two labels may not share a word; the paper
leaves it with both. Schick, Schmid & Schütze 2020 (PETAL), arXiv:2010.13641.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.errors import ConfigError, DataError
from inlay.fewshot.base import Base
from inlay.fewshot.prompts.template import Row, Template
from inlay.fewshot.prompts.verbalizer import Verbalizer, tokens_behind
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.scorers.scorer import on
from inlay.tasks.batches import evaluating

Measure = Literal["llr", "ce"]
EPSILON = 1e-12
"""Probabilities are kept this far from 0 and 1."""


def find_words(
    base: Base,
    templates: Sequence[Template],
    rows: Sequence[Row],
    labels: Sequence[str],
    unlabelled: Sequence[Row],
    *,
    most: int = 10_000,
    keep: int = 1000,
    per_label: int = 10,
    measure: Measure = "llr",
    max_length: int = 128,
    batch_size: int = 64,
) -> Verbalizer:
    """The words that the base itself expects for each label, chosen for all templates at once.

    Raises ConfigError for templates with soft slots, DataError when the unlabelled rows have no words to choose from.
    """
    soft = next((template for template in templates if template.soft), None)
    if soft is not None:
        raise ConfigError(
            f"words are looked for before anything is trained, and the soft slots of {soft.source!r} say nothing yet: "
            "write words in their place, or give the labels' words"
        )
    columns = dict.fromkeys(column for template in templates for column in template.columns)
    texts = [str(row[column]) for row in unlabelled for column in columns if row.get(column)]
    candidates = word_candidates(base.tokenizer, templates, texts, most=most)
    words = Verbalizer({word: word for word in candidates})
    with base.holding("masked-lm", None) as model:
        found = [
            word_probabilities(
                model,
                MaskScorer(tokenizer=base.tokenizer, template=template, verbalizer=words, max_length=max_length),
                rows,
                batch_size=batch_size,
            )
            for template in templates
        ]
    return search_words(torch.stack(found), labels, candidates, per_label=per_label, keep=keep, measure=measure)


def search_words(
    probabilities: Tensor,
    labels: Sequence[str],
    candidates: Sequence[str],
    *,
    per_label: int = 10,
    keep: int = 1000,
    measure: Measure = "llr",
) -> Verbalizer:
    """The best words for each label, best first, from their probabilities (rows, candidates), or (patterns, …).

    Raises ConfigError for sizes that do not fit, DataError when a label is alone or candidates are too few.
    """
    stacked = probabilities if probabilities.ndim == 3 else probabilities[None]
    if stacked.shape[1:] != (len(labels), len(candidates)):
        raise ConfigError(
            f"probabilities are {tuple(probabilities.shape)} for {len(labels)} rows and {len(candidates)} candidates"
        )
    names = list(dict.fromkeys(labels))
    if len(names) < 2:
        raise DataError(f"words are chosen for one label against others, and the rows have only {', '.join(names)}")
    offers: list[tuple[float, int, str]] = []
    for name in names:
        own = torch.tensor([label == name for label in labels])
        likely = stacked[:, own].double().clamp_min(EPSILON).log().sum((0, 1))
        kept = likely.topk(min(keep, len(candidates))).indices
        scores = word_scores(stacked[:, :, kept], own, measure).sum(0)
        offers += [(score, index, name) for score, index in zip(scores.tolist(), kept.tolist(), strict=True)]
    chosen: dict[str, list[str]] = {name: [] for name in names}
    taken: set[int] = set()
    for _, index, name in sorted(offers, key=lambda offer: (-offer[0], offer[1])):
        if index not in taken and len(chosen[name]) < per_label:
            taken.add(index)
            chosen[name].append(candidates[index])
    for name, words in chosen.items():
        if not words:
            raise DataError(
                f"no word is left for the label {name!r}: {len(candidates)} candidates are too few for {len(names)} "
                "labels; give more unlabelled rows, or ask for fewer words a label"
            )
    return Verbalizer(chosen)


def word_scores(probabilities: Tensor, own: Tensor, measure: Measure = "llr") -> Tensor:
    """How much better each word fits a label's rows than the others: (…, rows, words) -> (…, words).

    `own` (rows,) says which rows are the label's. `llr` changes its sign when all probabilities q become 1 − q.
    """
    if measure not in ("llr", "ce"):
        raise ConfigError(f"measure={measure!r}: llr and ce are known")
    q = probabilities.double()
    if measure == "llr":
        odds = torch.logit(q, EPSILON)
        return odds[..., own, :].mean(-2) - odds[..., ~own, :].mean(-2)
    hits, misses = q.clamp_min(EPSILON).log(), torch.log1p(-q.clamp_max(1 - EPSILON))
    return hits[..., own, :].mean(-2) + misses[..., ~own, :].mean(-2)


def word_probabilities(
    model: PreTrainedModel, scorer: MaskScorer, rows: Sequence[Row], *, batch_size: int = 64
) -> Tensor:
    """The probability, of the whole vocabulary, of the scorer's words at its one mask: (rows, labels), float32.

    The scorer has one word for each "label": the candidates. Raises ConfigError when it has several masks.
    """
    if scorer.template.masks != 1:
        raise ConfigError(
            f"words are looked for at one mask, and {scorer.template.source!r} has {scorer.template.masks}"
        )
    words = scorer.verbalizer.tokens(scorer.tokenizer, scorer.template)
    ids = torch.tensor([listed[0][0] for listed in words.values()])
    encoded = scorer.encode(rows)
    device, found = next(model.parameters()).device, torch.empty(len(rows), len(ids))
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = on(device, scorer.collate(encoded[start : start + batch_size]))
            logits = scorer.mask_logits(model, batch)[:, 0].float()
            found[start : start + batch_size] = logits.softmax(-1)[:, ids.to(device)].cpu()
    return found


def word_candidates(
    tokenizer: PreTrainedTokenizerBase,
    templates: Sequence[Template],
    texts: Iterable[str],
    *,
    most: int = 10_000,
    letters: int = 2,
) -> list[str]:
    """The `most` frequent tokens of the texts that begin a word, have so many letters and are one token at each mask.

    Told by where tokens stand in the text, so that it holds for every tokenizer. Raises DataError when there are none.
    """
    listed = list(texts)
    counts: Counter[int] = Counter()
    spelled: dict[int, Counter[str]] = {}
    read: Any = (
        tokenizer(listed, add_special_tokens=False, return_offsets_mapping=True, verbose=False) if listed else {}
    )
    for text, ids, offsets in zip(listed, read.get("input_ids", ()), read.get("offset_mapping", ()), strict=True):
        for token, (start, end) in zip(ids, offsets, strict=True):
            word = text[start:end].lstrip()
            first = end - len(word)
            if sum(map(str.isalpha, word)) >= letters and not (first and text[first - 1].isalnum()):
                counts[token] += 1
                spelled.setdefault(token, Counter())[word] += 1
    for special in tokenizer.all_special_ids:
        counts.pop(special, None)
    ordered = sorted(counts, key=lambda token: (-counts[token], token))
    words = [spelled[token].most_common(1)[0][0].rstrip() for token in ordered]
    whole = [True] * len(words)
    for template in templates:
        behind = tokens_behind(words, tokenizer, template.need_mask().before_mask())
        whole = [good and ids == (token,) for good, ids, token in zip(whole, behind, ordered, strict=True)]
    found = list(dict.fromkeys(word for word, good in zip(words, whole, strict=True) if good))[:most]
    if not found:
        raise DataError(
            f"the {len(listed)} unlabelled texts have no word that is one token at the mask: give more rows"
        )
    return found
