"""Ask for words of several tokens: as many masks as a word has tokens, filled in one after another.

    s(l | x) = mean over the words w of l of  Σ_i log p(w_i | P(x) with |w| masks, w's tokens filled in before w_i)

The order: "max_first" fills the masked place whose own token is the likeliest, reads on, and so forth; "ltr" goes from
left to right; "parallel" asks once for all places. A word of n tokens is asked for with exactly n masks, so that the
other labels' words do not matter to it. In training there are as many masks as the longest word has tokens, all of them
are read in one pass, and a word is scored at the first of them; the objective is `Hinge`.

Schick & Schütze 2021, arXiv:2009.07118, section 3.1.

What is computed: words of equal length share their rows' batches, words that agree in what was filled in so far share
one pass (all of them the first), and the head works at the places still masked alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import ConfigError, did_you_mean
from inlay.fewshot.learning.objectives import Hinge, Objective
from inlay.fewshot.prompts.encoding import Encoded
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.scorers.scorer import MODEL_INPUTS, Batch, Demonstration, on
from inlay.tasks.batches import evaluating
from inlay.tasks.head_positions import head_at

DECODES = ("max_first", "ltr", "parallel")
LEAST = -1e30
"""What log 0 is taken for: less than any other, yet more than what a place has that is filled already."""
AT_ONCE = 2**18
"""Logits that are normalised at once: a megabyte, which stays in a core's cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiMaskScorer(MaskScorer):
    """A pattern with {mask*} and words of any length. Raises ConfigError where words and masks do not fit."""

    decode: Literal["max_first", "ltr", "parallel"] = "max_first"
    """In which order the masks are filled in."""

    @override
    def __post_init__(self) -> None:
        if self.template.need_mask().masks is not None:
            raise ConfigError(
                f"{self.template.source!r} says how many masks it has: write {{mask*}}, or use MaskScorer"
            )
        if self.restrict:
            raise ConfigError(f"restrict=True is for masks read in one pass; {self.template.source!r} has {{mask*}}")
        if self.decode not in DECODES:
            raise ConfigError(f"decode={self.decode!r}{did_you_mean(self.decode, DECODES)}: {', '.join(DECODES)}")
        self._by_width  # noqa: B018 - what cannot be asked is an error now, not at the first batch

    @functools.cached_property
    def _by_width(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Number of tokens n -> the words of so many, (words, n), and their shares in the labels, (words, labels)."""
        found = self.verbalizer.tokens(self.tokenizer, self.template)
        grouped: dict[int, list[tuple[tuple[int, ...], int, float]]] = {}
        for label, words in enumerate(found.values()):
            for ids in words:
                grouped.setdefault(len(ids), []).append((ids, label, 1 / len(words)))
        made = {}
        for width, entries in sorted(grouped.items()):
            shares = torch.zeros(len(entries), len(found))
            for index, (_, label, share) in enumerate(entries):
                shares[index, label] = share
            made[width] = (torch.tensor([ids for ids, _, _ in entries]), shares)
        return made

    @property
    def width(self) -> int:
        """Tokens of the longest word."""
        return max(self._by_width)

    @override
    def objective(self) -> Objective:
        return Hinge()

    @override
    def encode(
        self, rows: Sequence[Row], demonstrations: Sequence[Sequence[Demonstration]] | None = None
    ) -> list[Encoded]:
        """Rows as token ids with as many masks as the longest word has tokens."""
        return self._encoded(rows, demonstrations, self.width)

    @override
    def __call__(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The parallel scores, with gradients: the sum of log p over a word's tokens from the first mask on."""
        logits = self.mask_logits(model, batch).float()
        log_norm = logits.logsumexp(-1)
        scores = logits.new_zeros(len(logits), len(self.labels))
        for width, (words, shares) in self._by_width.items():
            places, ids = torch.arange(width, device=logits.device), words.to(logits.device)
            found = logits[:, places, ids].sum(-1) - log_norm[:, :width].sum(-1, keepdim=True)
            scores = scores + found @ shares.to(logits.device)
        return scores

    @override
    def scores(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        *,
        demonstrations: Sequence[Sequence[Demonstration]] | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """All rows' decoded scores (rows, labels), in eval mode without gradients, as float32 on the CPU."""
        device = next(model.parameters()).device
        found = torch.zeros(len(rows), len(self.labels))
        with evaluating(model):
            for width, (words, shares) in self._by_width.items():
                encoded = self._encoded(rows, demonstrations, width)
                order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
                for start in range(0, len(order), batch_size):
                    chosen = order[start : start + batch_size]
                    batch = on(device, self.collate([encoded[index] for index in chosen]))
                    found[chosen] += self._decoded(model, batch, words.to(device), batch_size).cpu() @ shares
        return found

    def _decoded(self, model: PreTrainedModel, batch: Batch, words: Tensor, batch_size: int) -> Tensor:
        """Σ log p of each word (words, n), filled into the batch's n masks: (rows, words)."""
        rows, (count, width) = len(batch["input_ids"]), words.shape
        pairs = words.repeat(rows, 1)  # a (row, word) pair each, by rows
        owner = torch.arange(rows, device=words.device).repeat_interleave(count)
        filled, total = torch.zeros_like(pairs, dtype=torch.bool), torch.zeros(rows * count, device=words.device)
        for step in range(width):
            log_p = torch.full(pairs.shape, -torch.inf, device=words.device)
            for chosen, found in self._asked(model, batch, pairs, owner, filled, batch_size):
                log_p[chosen] = log_p[chosen].masked_scatter(~filled[chosen], found.clamp_min(LEAST))
            if self.decode == "parallel":
                return log_p.sum(-1).view(rows, count)
            place = log_p.argmax(-1) if self.decode == "max_first" else torch.full_like(total, step, dtype=torch.long)
            total += log_p.gather(1, place[:, None])[:, 0]
            filled = filled.scatter(1, place[:, None], True)
        return total.view(rows, count)

    def _asked(
        self, model: PreTrainedModel, batch: Batch, pairs: Tensor, owner: Tensor, filled: Tensor, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(numbers of pairs, log p of their tokens at the places still masked, in their order), a batch at a time.

        Pairs of one row with the same tokens filled in at the same places are asked once.
        """
        width = pairs.shape[1]
        keys = torch.cat([owner[:, None], pairs.masked_fill(~filled, -1)], 1)
        states, state_of = torch.unique(keys, dim=0, return_inverse=True)
        places = batch["masks"].nonzero()[:, 1].view(-1, width)
        for start in range(0, len(states), batch_size):
            row, state = states[start : start + batch_size, 0], states[start : start + batch_size, 1:]
            known, attention = state >= 0, batch["attention_mask"][row]
            read = slice(int(attention.sum(-1).max()))  # these rows may be shorter than the longest of all
            ids, masks = batch["input_ids"][row, read], batch["masks"][row, read]
            ids[masks] = torch.where(known, state, ids.gather(1, places[row])).flatten()
            open_places = masks.scatter(1, places[row], ~known)
            inputs = {"input_ids": ids, "attention_mask": attention[:, read]}
            with head_at(model, open_places):
                logits = model(**{name: inputs[name] for name in MODEL_INPUTS}).logits[:, 0]
            logits = logits.view(len(row), -1, logits.shape[-1])
            chosen = ((state_of >= start) & (state_of < start + batch_size)).nonzero()[:, 0]
            own = state_of[chosen] - start
            targets = pairs[chosen][~filled[chosen]].view(len(chosen), -1)
            at = torch.arange(targets.shape[1], device=targets.device)
            yield chosen, logits[own[:, None], at, targets].float() - _log_norm(logits)[own]

    @override
    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "kind": "multi-mask", "decode": self.decode}

    @override
    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Self:
        return dataclasses.replace(super().from_dict(fields, tokenizer), decode=fields["decode"])


def _log_norm(logits: Tensor) -> Tensor:
    """log Σ exp over the vocabulary, (…, vocabulary) to (…), in float32.

    A few rows at a time: with 250,002 tokens what lies between would be hundreds of megabytes of fresh memory, and
    asking for it took as long as the head's product.
    """
    rows: tuple[Tensor, ...] = logits.flatten(0, -2).split(max(1, AT_ONCE // logits.shape[-1]))  # type: ignore[no-untyped-call]
    return torch.cat([part.float().logsumexp(-1) for part in rows]).view(logits.shape[:-1])
