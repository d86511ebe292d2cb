"""Label words found by the model itself: those with which it answers best before any training.

    V_c = the k words with the largest  mean_{x of class c} log p([mask] = w | T(x))
    v*  = argmax over v in V_1 × … × V_C of  accuracy( argmax_c  log p([mask] = v(c) | T(x)) )

All combinations are scored where they are no more than `budget`; else a coordinate ascent, from the likeliest words and
then from random ones, scores as many. Of combinations with the same accuracy those come first whose words have the
larger mean log-probabilities, summed over the classes.

Gao et al. 2021, "Making Pre-trained Language Models Better Few-shot Learners", arXiv:2012.15723, section 5.1.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.errors import ConfigError, DataError
from inlay.fewshot.learning.objectives import as_targets
from inlay.fewshot.prompts.template import Row, Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.scorers.scorer import on
from inlay.tasks.batches import evaluating

CHUNK = 8192
"""Combinations that are scored at once."""


@dataclasses.dataclass(frozen=True)
class Near:
    """Keeps of each class's k words the `count` nearest to a word given by hand: cosine of the LM head's rows."""

    head: Tensor
    """The head's rows, (vocabulary, hidden)."""
    words: Mapping[str, int]
    """For each label the token of its word."""
    count: int = 20

    def of(self, label: str, tokens: Tensor) -> Tensor:
        """The nearest of `tokens` (k,) in their own order."""
        if label not in self.words:
            raise ConfigError(f"near has no word for the label {label!r}; it has: {', '.join(self.words)}")
        cosines = functional.cosine_similarity(self.head[tokens].float(), self.head[self.words[label]][None].float())
        kept = cosines.argsort(descending=True, stable=True)[: self.count]
        return tokens[kept.sort().values]


def word_starts(tokenizer: PreTrainedTokenizerBase, template: Template) -> dict[int, str]:
    """Token -> word, for each token that is a whole word, of letters alone, at the template's mask.

    What begins a word is told by decoding it behind another word, and what stands at the mask by cutting the word
    there into tokens; no vocabulary's own sign for a space is read.
    """
    stem: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    alone = str(tokenizer.decode(stem))
    special = set(tokenizer.all_special_ids)
    ids = [token for token in range(len(tokenizer)) if token not in special]
    decoded = tokenizer.batch_decode([[*stem, token] for token in ids], clean_up_tokenization_spaces=False)
    words = [text[len(alone) + 1 :] for text in decoded if text.startswith(f"{alone} ")]
    words = list(dict.fromkeys(word for word in words if word and _is_word(word)))
    before = template.before_mask()
    first: list[int] = list(tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"])
    read: Any = tokenizer([before + word for word in words], add_special_tokens=False) if words else {"input_ids": []}
    found: dict[int, str] = {}
    for word, whole in zip(words, read["input_ids"], strict=True):
        if len(whole) == len(first) + 1 and whole[:-1] == first and whole[-1] not in special:
            found.setdefault(whole[-1], word)
    return found


def _is_word(text: str) -> bool:
    """Whether it is all letters, and the marks that some scripts write on them."""
    return all(unicodedata.category(sign)[0] in "LM" for sign in text)


def vocabulary_scores(
    model: PreTrainedModel, scorer: MaskScorer, rows: Sequence[Row], *, batch_size: int = 16
) -> Tensor:
    """The logits of the whole vocabulary at each row's (one) mask, (rows, vocabulary), float32 on the CPU."""
    if scorer.template.masks != 1:
        raise ConfigError(f"label words are searched at one mask, and {scorer.template.source!r} has several")
    encoded, device = scorer.encode(rows), next(model.parameters()).device
    found = []
    with evaluating(model):
        for start in range(0, len(encoded), batch_size):
            batch = on(device, scorer.collate(encoded[start : start + batch_size]))
            found.append(scorer.mask_logits(model, batch)[:, 0].float().cpu())
    return torch.cat(found)


def search_labels(
    scores: Tensor,
    y: Sequence[str],
    candidates: Mapping[int, str],
    k: int = 100,
    n: int = 100,
    *,
    labels: Sequence[str] | None = None,
    near: Near | None = None,
    budget: int = 1_000_000,
    seed: int = 0,
) -> list[Verbalizer]:
    """The n best verbalizers, best first, of one word a label.

    `scores` (examples, vocabulary): logits at the mask, of which log-probabilities are made, so that a constant added
    to an example changes nothing; `y`: the examples' labels; `candidates`: token -> word; `labels`: in the order of
    the verbalizers (None: sorted). `budget`: how many combinations are scored. Raises DataError for a label without
    examples or an example of another label, ConfigError when there are fewer candidates than labels.
    """
    if min(k, n, budget) < 1:
        raise ConfigError(f"k={k!r}, n={n!r}, budget={budget!r}: whole numbers of at least 1 are needed")
    names = list(labels) if labels is not None else sorted(set(y))
    if len(candidates) < len(names):
        raise ConfigError(f"{len(names)} labels need a word each, and there are {len(candidates)} candidates")
    log_probs = scores.double().log_softmax(-1)
    tokens = torch.tensor(sorted(candidates))
    numbers = as_targets(y, names)
    pools = []
    for number, name in enumerate(names):
        if not (numbers == number).any():
            raise DataError(f"the label {name!r} has no example: its words cannot be searched")
        means = log_probs[numbers == number][:, tokens].mean(0)
        best = tokens[means.argsort(descending=True, stable=True)[:k]]
        pools.append(best if near is None else near.of(name, best))
    space = _Space(log_probs, numbers, pools)
    total = math.prod(len(pool) for pool in pools)
    scored = space.everything() if total <= budget else space.ascent(budget, seed)
    return [
        Verbalizer({name: candidates[token] for name, token in zip(names, chosen, strict=True)})
        for chosen in space.best(scored, n)
    ]


class _Space:
    """Combinations of one word for each class, as places (combinations, classes) in the classes' pools."""

    def __init__(self, log_probs: Tensor, y: Tensor, pools: Sequence[Tensor]) -> None:
        self.y, self.pools = y, pools
        self.values = [log_probs[:, pool] for pool in pools]
        self.means = [value[y == number].mean(0) for number, value in enumerate(self.values)]

    def scored(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those without a word twice, with their right answers and the sum of their mean log-probabilities."""
        tokens = torch.stack([pool[places[:, c]] for c, pool in enumerate(self.pools)], -1)
        ordered = tokens.sort(-1).values
        places = places[(ordered[:, 1:] != ordered[:, :-1]).all(-1)]
        columns = [places[:, c] for c in range(len(self.pools))]
        asked = torch.stack([value[:, at] for value, at in zip(self.values, columns, strict=True)])
        right = (asked.argmax(0) == self.y[:, None]).sum(0)
        return places, right, torch.stack([m[at] for m, at in zip(self.means, columns, strict=True)]).sum(0)

    def everything(self) -> Iterator[Tensor]:
        """All combinations, in chunks."""
        shape = [len(pool) for pool in self.pools]
        total = math.prod(shape)
        for start in range(0, total, CHUNK):
            yield torch.stack(torch.unravel_index(torch.arange(start, min(start + CHUNK, total)), shape), -1)

    def ascent(self, budget: int, seed: int) -> Iterator[Tensor]:
        """Class after class all words beside the best of the others, until nothing gets better; then a new start."""
        generator = torch.Generator().manual_seed(seed)
        start = self._distinct([0] * len(self.pools))
        while budget > 0:
            best, unchanged = start, 0
            for c in itertools.cycle(range(len(self.pools))):
                tried = best.repeat(min(len(self.pools[c]), budget), 1)
                tried[:, c] = torch.arange(len(tried))
                budget -= len(tried)
                yield tried
                places, right, means = self.scored(tried)
                found = best
                if len(places):
                    found = places[max(range(len(places)), key=lambda i: (int(right[i]), float(means[i])))]
                unchanged = unchanged + 1 if torch.equal(found, best) else 0
                best = found
                if budget <= 0 or unchanged == len(self.pools):
                    break
            start = self._distinct([int(torch.randint(len(pool), (), generator=generator)) for pool in self.pools])

    def _distinct(self, places: Sequence[int]) -> Tensor:
        """The same places, or for words that stand there already the next ones in their pools."""
        taken, found = set[int](), []
        for pool, place in zip(self.pools, places, strict=True):
            turned = [*range(place, len(pool)), *range(place)]
            found.append(next((at for at in turned if int(pool[at]) not in taken), place))
            taken.add(int(pool[found[-1]]))
        return torch.tensor(found)

    def best(self, chunks: Iterator[Tensor], n: int) -> list[list[int]]:
        """The tokens of the n best: by right answers, then by mean log-probabilities, then by their places."""
        kept: dict[tuple[int, ...], tuple[int, float]] = {}
        for chunk in chunks:
            places, right, means = self.scored(chunk)
            order = means.argsort(descending=True, stable=True)
            order = order[right[order].argsort(descending=True, stable=True)][:n]
            for at in order.tolist():
                kept[tuple(places[at].tolist())] = (int(right[at]), float(means[at]))
            if len(kept) > 20 * n:
                kept = dict(self._sorted(kept)[:n])
        return [
            [int(pool[at]) for pool, at in zip(self.pools, place, strict=True)]
            for place, _ in self._sorted(kept)[:n]
        ]  # fmt: skip

    @staticmethod
    def _sorted(kept: Mapping[tuple[int, ...], tuple[int, float]]) -> list[tuple[tuple[int, ...], tuple[int, float]]]:
        return sorted(kept.items(), key=lambda item: (-item[1][0], -item[1][1], item[0]))
