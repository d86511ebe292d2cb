"""Sequence to sequence: a source to a target text, by an encoder-decoder.

Rows are source/target (or several targets), or instruction/input/target. Trained by the cross-entropy of the target's
tokens; evaluated by that loss, and by generating: exact match always, ROUGE and BLEU where their libraries are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import DataError
from inlay.tasks import columns as named_columns
from inlay.tasks.batches import IGNORE, Pass, check_fit, length_limit, padder, summed_loss
from inlay.tasks.data import source_name
from inlay.tasks.generation import generate
from inlay.tasks.loading import load_pretrained
from inlay.tasks.prompts import ALIASES, default_template, guess_pair, need_references, prompts, references
from inlay.tasks.task import Collator, Task
from inlay.tasks.text_metrics import EXTRA, METRICS, check, installed, text_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2Seq(Task):
    """Sources to targets."""

    kind: ClassVar[str] = "seq2seq"
    roles: ClassVar[tuple[str, ...]] = ("source", "target", "instruction", "input")

    max_length: int = 256
    """Tokens of a source at most, special tokens included."""
    max_target_length: int = 64
    """Tokens of a target at most, learned or generated."""
    prompt_template: str | None = None
    """How a row becomes its source, such as T5's "summarize: {source}"; fields are roles or columns."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    metrics: tuple[str, ...] | None = None
    """exact_match, rouge, bleu; None takes those whose library is installed."""

    def __post_init__(self) -> None:
        if isinstance(self.columns, Mapping):
            columns = {ALIASES.get(role, role): column for role, column in self.columns.items()}
            object.__setattr__(self, "columns", columns)
        super().__post_init__()
        check(self.metrics or ())

    # -- from the data -----------------------------------------------------------------------------------------------

    @override
    def guess(self, rows: Dataset) -> dict[str, str]:
        pair = guess_pair(rows, self.columns)
        if pair is None:
            has_source = "source" in self.columns or named_columns.named(rows, named_columns.SOURCE) is not None
            raise named_columns.cannot_guess(rows, "target" if has_source else "source")
        return pair

    @override
    def complete(self, splits: Mapping[str, Dataset]) -> Self:
        task = dataclasses.replace(
            self,
            prompt_template=self.prompt_template or default_template(self.columns).rstrip("\n"),
            metrics=installed() if self.metrics is None else self.metrics,
        )
        for split, rows in splits.items():
            task._sources(rows)
            (references if split == "test" else need_references)(rows, self.column("target"))
        return task

    @override
    def details(self) -> str:
        missing = [name for name in METRICS if name not in installed()]
        more = f"; for {' and '.join(missing)}: pip install 'inlay[{EXTRA}]'" if missing else ""
        return f"source: {self.prompt_template!r}; metrics: {', '.join(self.metrics or ())}{more}"

    def _sources(self, rows: Dataset) -> list[str]:
        self.column("instruction" if "instruction" in self.columns else "source")
        return prompts(rows, self.columns, self.prompt_template or default_template(self.columns).rstrip("\n"))

    # -- the model ---------------------------------------------------------------------------------------------------

    @property
    @override
    def primary_metric(self) -> tuple[str, bool]:
        chosen = self.metrics or ()
        return ("rougeL" if "rouge" in chosen else "bleu" if "bleu" in chosen else "exact_match", True)

    @override
    def load_model(self, model: str | Path, **kwargs: Any) -> PreTrainedModel:
        return load_pretrained(AutoModelForSeq2SeqLM, model, purpose=self.kind, new_head=False, **kwargs)

    # -- rows to batches to results ----------------------------------------------------------------------------------

    @override
    def features(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, train: bool) -> Dataset:
        """Tokenised sources and targets; in training one example for each of a row's targets, otherwise the first."""
        sources, several = self._sources(rows), references(rows, self.column("target"))
        if several is None and train:
            raise DataError(f"{source_name(rows)} has no column {self.column('target')!r} to train on")
        targets: list[str] = []
        besides = self.beside(rows)
        if several is not None:
            kept = [found if train else found[:1] for found in several]
            sources = [source for source, found in zip(sources, kept, strict=True) for _ in found]
            besides = [more for more, found in zip(besides, kept, strict=True) for _ in found] if besides else []
            targets = [target for found in kept for target in found]
        encoded = dict(tokenizer(sources, truncation=True, max_length=length_limit(tokenizer, self.max_length)))
        if targets:
            limit = length_limit(tokenizer, self.max_target_length)
            encoded["labels"] = tokenizer(text_target=targets, truncation=True, max_length=limit)["input_ids"]
        encoded |= {name: [more[name] for more in besides] for name in besides[0]} if besides else {}
        return Dataset.from_dict(encoded)

    def beside(self, rows: Dataset) -> list[dict[str, Any]]:
        """What else a row gives the encoder beside its source: for each row the same columns, or nothing at all."""
        return []

    def wrap(self, model: PreTrainedModel) -> Callable[[Collator], Collator]:
        """From a collator of sources and targets to one that takes `beside` too."""
        return lambda text: text

    @override
    def check_fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        check_fit(model, tokenizer, max(self.max_length, self.max_target_length))

    @override
    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
        self.check_fit(model, tokenizer)
        return self.batcher(tokenizer, model)

    def batcher(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
        """The collator, for a tokenizer and a model that are known to fit."""
        return self.wrap(model)(padder(tokenizer, model, labels=IGNORE))

    @override
    def labelled(self, rows: Dataset) -> bool:
        return references(rows, self.column("target")) is not None

    @override
    def scores(self, rows: Dataset, through: Pass) -> dict[str, float]:
        """loss (nats a token of the first target) and the text metrics of what is generated."""
        several = need_references(rows, self.column("target"))
        features = self.features(rows, through.tokenizer, train=False)
        total, count = 0.0, 0
        for _, batch in through.batches(features, self.batcher(through.tokenizer, through.model)):
            labels = batch["labels"]
            total += summed_loss(through.model(**batch).logits[:, -labels.shape[1] :].float(), labels)
            count += int((labels != IGNORE).sum())
        found = [row["generation"] for row in self.answers(rows, through)]
        chosen = installed() if self.metrics is None else self.metrics
        return {"loss": total / count} | text_scores(chosen, found, several)

    @override
    def answers(self, rows: Dataset, through: Pass) -> list[dict[str, Any]]:
        """{"source", "generation"} a row."""
        sources, limit = self._sources(rows), length_limit(through.tokenizer, self.max_length)
        ids = through.tokenizer(sources, truncation=True, max_length=limit)["input_ids"]
        found = generate(
            through,
            ids,
            max_new_tokens=self.max_target_length,
            num_beams=self.num_beams,
            beside=self.beside(rows),
            wrap=self.wrap(through.model),
        )
        return [{"source": source, "generation": text} for source, text in zip(sources, found, strict=True)]
