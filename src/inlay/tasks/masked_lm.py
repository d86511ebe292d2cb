"""Masked language modelling: guess the hidden tokens of a text.

    Of a text's tokens 15% are chosen; 80% of these become the mask token, 10% a random token, 10% stay as they are.
    loss = mean cross-entropy over the chosen tokens; perplexity = exp(loss)

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding". Masks are drawn
anew for every batch from a generator seeded by the batch's own tokens, so that they change from epoch to epoch (the
shuffle does) and yet a resumed run sees the very same ones. Long texts are cut into several examples; none is lost.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import ConfigError, DataError
from inlay.tasks import columns as named_columns
from inlay.tasks.batches import IGNORE, Padder, Pass, check_fit, length_limit, padder, summed_loss
from inlay.tasks.columns import texts
from inlay.tasks.data import place
from inlay.tasks.head_positions import logits_at
from inlay.tasks.loading import load_pretrained, load_tokenizer
from inlay.tasks.task import Collator, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(Task):
    """Texts to themselves. Role: text."""

    kind: ClassVar[str] = "masked-lm"
    roles: ClassVar[tuple[str, ...]] = ("text",)
    few_labels: ClassVar[bool] = True

    mask_probability: float = 0.15
    """The share of tokens to guess; at least one in every example."""
    seed: int = 0
    """What the masks are drawn from, beside the tokens themselves."""
    new_head: bool = False
    """Accept a base without a masked-language-model head and start a new one from random numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_probability <= 1:
            raise ConfigError(f"mask_probability must lie in (0, 1], not {self.mask_probability}")

    # -- from the data -----------------------------------------------------------------------------------------------

    @override
    def guess(self, rows: Dataset) -> dict[str, str]:
        return {"text": self.columns.get("text") or named_columns.guess_text(rows)}

    @override
    def complete(self, splits: Mapping[str, Dataset]) -> Self:
        for rows in splits.values():
            texts(rows, self.column("text"), "text")
        return self

    # -- the model ---------------------------------------------------------------------------------------------------

    @property
    @override
    def primary_metric(self) -> tuple[str, bool]:
        return ("loss", False)

    @override
    def load_tokenizer(self, model: str | Path) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(model)
        if tokenizer.mask_token_id is None:
            raise ConfigError(f"{model} cannot do {self.kind}: its tokenizer has no mask token")
        return tokenizer

    @override
    def load_model(self, model: str | Path, **kwargs: Any) -> PreTrainedModel:
        return load_pretrained(AutoModelForMaskedLM, model, purpose=self.kind, new_head=self.new_head, **kwargs)

    # -- rows to batches to results ----------------------------------------------------------------------------------

    @override
    def features(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, train: bool) -> Dataset:
        """Each text in pieces of at most `max_length` tokens, with a mask of the special ones; no labels yet."""
        encoded = tokenizer(
            texts(rows, self.column("text"), "text"),
            truncation=True,
            max_length=length_limit(tokenizer, self.max_length),
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        columns = {name: encoded[name] for name in encoded if name != "overflow_to_sample_mapping"}
        keep = [index for index, special in enumerate(columns["special_tokens_mask"]) if not all(special)]
        return Dataset.from_dict({name: [cells[index] for index in keep] for name, cells in columns.items()})

    @override
    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
        check_fit(model, tokenizer, self.max_length)
        return self._masker(tokenizer, model, each_row=False)

    def _masker(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, each_row: bool) -> Masker:
        return Masker(
            padder(tokenizer, model, special_tokens_mask=1),
            mask_id=int(tokenizer.mask_token_id),
            vocabulary=len(tokenizer),
            probability=self.mask_probability,
            seed=self.seed,
            each_row=each_row,
        )

    @override
    def scores(self, rows: Dataset, through: Pass) -> dict[str, float]:
        """loss, perplexity and accuracy over masks that depend on `seed` and each text alone, not on the batches."""
        features = self.features(rows, through.tokenizer, train=False)
        total, right, count = 0.0, 0, 0
        for _, batch in through.batches(features, self._masker(through.tokenizer, through.model, each_row=True)):
            labels = batch.pop("labels")
            chosen = labels != IGNORE
            logits = logits_at(through.model, chosen, **batch).float()
            total += summed_loss(logits, labels[chosen])
            right += int((logits.argmax(-1) == labels[chosen]).sum())
            count += int(chosen.sum())
        loss = total / count
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": right / count}

    @override
    def answers(self, rows: Dataset, through: Pass) -> list[dict[str, Any]]:
        """The likeliest token for each mask written in the texts ("[MASK]", or the tokenizer's own mask token)."""
        tokenizer, model = through.tokenizer, through.model
        mask, limit = str(tokenizer.mask_token), length_limit(tokenizer, self.max_length)
        given = texts(rows, self.column("text"), "text")
        spelled = [text.replace("[MASK]", mask) for text in given]
        encoded = tokenizer(spelled, truncation=True, max_length=limit)
        for index, ids in enumerate(encoded["input_ids"]):
            if tokenizer.mask_token_id not in ids:
                raise DataError(f"{place(rows, index)}: there is no {mask} to fill in (in the first {limit} tokens)")
        results: list[dict[str, Any]] = [{} for _ in given]
        for indices, batch in through.batches(Dataset.from_dict(dict(encoded)), padder(tokenizer, model)):
            logits = model(**batch).logits[:, -batch["input_ids"].shape[1] :].float()
            for index, ids, row in zip(indices, batch["input_ids"], logits, strict=True):
                scores, found = row[ids == tokenizer.mask_token_id].softmax(-1).max(-1)
                tokens = [str(tokenizer.decode([token])).strip() for token in found.tolist()]
                filled = spelled[index]
                for token in tokens:
                    filled = filled.replace(mask, token, 1)
                fills = [{"token": token, "score": score} for token, score in zip(tokens, scores.tolist(), strict=True)]
                results[index] = {"text": given[index], "filled": filled, "fills": fills}
        return results


@dataclasses.dataclass(frozen=True)
class Masker:
    """Collator: pads, and hides tokens. `each_row` seeds every row by itself, so that batching does not matter."""

    padder: Padder
    mask_id: int
    vocabulary: int
    probability: float
    seed: int
    each_row: bool

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One batch with "labels": the tokens to guess, everything else ignored."""
        batch = self.padder(rows)
        special = batch.pop("special_tokens_mask").bool()
        ids = batch["input_ids"]
        drawn = [self._draw([row["input_ids"]], ids.shape[1]) for row in rows] if self.each_row else None
        dice, fate, random = (
            (torch.cat(parts) for parts in zip(*drawn, strict=True))
            if drawn
            else self._draw([row["input_ids"] for row in rows], ids.shape[1])
        )
        dice = dice.masked_fill(special, 2.0)
        chosen = dice < self.probability
        lowest = torch.zeros_like(chosen).scatter(1, dice.argmin(1, keepdim=True), True)
        chosen |= lowest & ~special  # no example without anything to guess: its loss would be 0/0
        batch["labels"] = ids.masked_fill(~chosen, IGNORE)
        hidden = torch.where(chosen & (fate < 0.8), self.mask_id, ids)
        batch["input_ids"] = torch.where(chosen & (fate >= 0.9), random, hidden)
        return batch

    def _draw(self, rows: list[list[int]], width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random numbers (rows, width) for choosing, for what becomes of the chosen, and random tokens."""
        key = hashlib.blake2b(repr((self.seed, rows)).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        longest = max(len(row) for row in rows)
        size = (len(rows), longest)
        numbers = (
            torch.rand(size, generator=generator),
            torch.rand(size, generator=generator),
            torch.randint(self.vocabulary, size, generator=generator),
        )
        dice, fate, random = (functional.pad(tensor, (0, width - longest)) for tensor in numbers)
        return dice, fate, random
