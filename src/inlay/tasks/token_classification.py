"""Token classification: a tag for every word, as in named entities (BIO spans) or parts of speech (one class a word).

A word's tag stands at its first sub-token; the others carry no label. Words that truncation cuts off, or that the
tokenizer drops, are predicted "O" (the first tag where there is no O) and counted in "words_lost".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from inlay.errors import ConfigError, DataError
from inlay.tasks import columns as named_columns
from inlay.tasks.batches import IGNORE, batches, check_fit, evaluating, length_limit, padder
from inlay.tasks.columns import values
from inlay.tasks.data import place, source_name
from inlay.tasks.labels import check_known, label_name, sort_labels
from inlay.tasks.loading import load_pretrained, load_tokenizer
from inlay.tasks.spans import OUTSIDE, close_labels, is_span_scheme, span_scores, to_bio
from inlay.tasks.task import Collator, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenClassification(Task):
    """Words to tags. Roles: tokens (a list of words), tags (a list as long)."""

    kind: ClassVar[str] = "token-classification"
    roles: ClassVar[tuple[str, ...]] = ("tokens", "tags")

    labels: tuple[str, ...] | None = None
    """The tags in the order of the model's outputs; collected from the training rows (B- and I- of each type) when None."""
    scheme: str | None = None
    """"bio" (spans, scored by span F1) or "plain" (one class a word, scored by accuracy); told from the tags when None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme not in (None, "bio", "plain"):
            raise ConfigError(f"scheme {self.scheme!r} is neither 'bio' nor 'plain'")

    # -- from the data -----------------------------------------------------------------------------------------------

    def guess(self, rows: Dataset) -> dict[str, str]:
        found = dict(self.columns)
        for role, names in (("tokens", named_columns.TOKENS), ("tags", named_columns.TAGS)):
            if role not in found:
                lists = named_columns.list_columns(rows, without=found.values())
                column = named_columns.named(rows, names, without=set(rows.column_names) - set(lists))
                if column is None and len(lists) != 1:
                    raise named_columns.cannot_guess(rows, role)
                found[role] = column or lists[0]
        return {role: found[role] for role in self.roles}

    def complete(self, splits: Mapping[str, Dataset]) -> Self:
        task = self
        if self.labels is None:
            if "train" not in splits:
                raise DataError("the tags come from the training rows, and there are none: give a train split, or labels=…")
            tags = self._tags(splits["train"])
            if tags is None:
                raise DataError(f"{source_name(splits['train'])}: the tags column {self.column('tags')!r} is empty in every row")
            used = {tag for row in tags for tag in row}
            scheme = self.scheme or ("bio" if is_span_scheme(used) else "plain")
            names = named_columns.class_names(splits["train"], self.column("tags")) if scheme == "plain" else close_labels(used)
            task = dataclasses.replace(self, labels=names or sort_labels(used), scheme=scheme)
        elif self.scheme is None:
            task = dataclasses.replace(self, scheme="bio" if is_span_scheme(self.labels) else "plain")
        for split, rows in splits.items():
            task._words(rows)
            tags = task._tags(rows)
            if tags is None and split != "test":
                raise DataError(f"{source_name(rows)}: the {split} rows have no tags (column {task.column('tags')!r})")
            if tags is not None:
                assert task.labels is not None
                check_known(tags, task.labels, rows, split, from_train=self.labels is None)
        return task

    def details(self) -> str:
        return f"tags: {', '.join(self.labels or ())} ({self.scheme})"

    # -- reading rows ------------------------------------------------------------------------------------------------

    def _words(self, rows: Dataset) -> list[list[str]]:
        cells = values(rows, self.column("tokens"), "tokens")
        for index, words in enumerate(cells):
            if not isinstance(words, list) or not words or any(not isinstance(word, str) for word in words):
                what = "empty" if not words else "not a list of strings"
                raise DataError(f"{place(rows, index)}: the tokens (column {self.column('tokens')!r}) are {what}; "
                                f"mend the row or leave it out")  # fmt: skip
        return cells

    def _tags(self, rows: Dataset) -> list[list[str]] | None:
        """Tag names row by row, in strict BIO where the scheme is spans; None where the rows have none."""
        column = self.column("tags")
        if column not in rows.column_names or all(cell is None for cell in rows[column][:]):
            return None
        named: list[list[str]] = []
        for index, (words, tags) in enumerate(zip(self._words(rows), values(rows, column, "tags"), strict=True)):
            if not isinstance(tags, list) or len(tags) != len(words) or any(tag is None for tag in tags):
                found = f"{len(tags)} tags" if isinstance(tags, list) else f"tags {tags!r}"
                raise DataError(f"{place(rows, index)}: {len(words)} tokens and {found} (column {column!r}); "
                                f"each token needs one tag")  # fmt: skip
            named.append([label_name(tag) for tag in tags])
        spans = self.scheme == "bio" or (self.scheme is None and is_span_scheme(tag for row in named for tag in row))
        return [to_bio(row) for row in named] if spans else named

    # -- the model ---------------------------------------------------------------------------------------------------

    @property
    def primary_metric(self) -> tuple[str, bool]:
        return ("accuracy", True) if self.scheme == "plain" else ("f1", True)

    def load_tokenizer(self, model: str | Path) -> PreTrainedTokenizerBase:
        """A tokenizer that keeps track of words; those that mark a word by the space before it are told to add one."""
        tokenizer = load_tokenizer(model)
        if getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = load_tokenizer(model, add_prefix_space=True)
        if not tokenizer.is_fast:
            raise ConfigError(f"the tokenizer of {model} cannot tell words from sub-tokens (it is not a fast one)")
        return tokenizer

    def load_model(self, model: str | Path, **kwargs: Any) -> PreTrainedModel:
        names = self._resolved_labels()
        return load_pretrained(
            AutoModelForTokenClassification, model, purpose=self.kind, new_head=True, num_labels=len(names),
            id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)}, **kwargs,
        )  # fmt: skip

    def _resolved_labels(self) -> tuple[str, ...]:
        if self.labels is None:
            raise ConfigError(f"{self.kind} does not know its tags yet: call resolve(splits) first, or give labels=…")
        return self.labels

    # -- rows to batches to results ----------------------------------------------------------------------------------

    def _encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], list[list[int | None]]]:
        """Tokenised rows, and for each token the number of the word that it begins (None for all other tokens)."""
        encoded = tokenizer(
            self._words(rows), is_split_into_words=True, truncation=True, max_length=length_limit(tokenizer, self.max_length)
        )
        firsts = []
        for index in range(len(rows)):
            words = encoded.word_ids(index)
            firsts.append([word if word != before else None for before, word in zip([None, *words], words, strict=False)])
        return dict(encoded), firsts

    def features(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, train: bool) -> Dataset:
        encoded, firsts = self._encode(rows, tokenizer)
        tags = self._tags(rows)
        if tags is None and train:
            raise DataError(f"{source_name(rows)} has no column {self.column('tags')!r} to train on")
        if tags is not None:
            names = self._resolved_labels()
            check_known(tags, names, rows, "train" if train else "given", from_train=True)
            ids = {name: index for index, name in enumerate(names)}
            encoded["labels"] = [
                [IGNORE if word is None else ids[row[word]] for word in first] for first, row in zip(firsts, tags, strict=True)
            ]
        return Dataset.from_dict(encoded)

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
        check_fit(model, tokenizer, self.max_length)
        return padder(tokenizer, model, labels=IGNORE)

    def _tag(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int, what: str, progress: bool
    ) -> tuple[list[list[str]], int, tuple[float, int]]:
        """Predicted tags of all words, how many words the model never saw, and (sum of losses, labels) where there are labels."""
        names = self._resolved_labels()
        features, (_, firsts) = self.features(rows, tokenizer, train=False), self._encode(rows, tokenizer)
        words = [len(row) for row in self._words(rows)]
        tagged = [[OUTSIDE if OUTSIDE in names else names[0]] * count for count in words]
        total, count = 0.0, 0
        with evaluating(model):
            for indices, batch in batches(model, features, self.collator(tokenizer, model), batch_size, what=what, progress=progress):
                labels = batch.pop("labels", None)
                logits = model(**batch).logits.float()[:, -batch["input_ids"].shape[1] :]  # without soft prompts, if any
                if labels is not None:
                    total += functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum").item()
                    count += int((labels != IGNORE).sum())
                for index, best in zip(indices, logits.argmax(-1).tolist(), strict=True):
                    for word, label in zip(firsts[index], best, strict=False):
                        if word is not None:
                            tagged[index][word] = names[label]
        seen = sum(word is not None for row in firsts for word in row)
        return tagged, sum(words) - seen, (total, count)

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, *, batch_size: int = 32, progress: bool = False
    ) -> dict[str, float]:
        true = self._tags(rows)
        if true is None:
            raise DataError(f"{source_name(rows)} has no tags to evaluate against (column {self.column('tags')!r})")
        tagged, lost, (total, count) = self._tag(model, tokenizer, rows, batch_size, "evaluating", progress)
        flat = [[tag for row in side for tag in row] for side in (tagged, true)]
        scores = {"loss": total / max(count, 1), "accuracy": float(accuracy_score(flat[1], flat[0]))}
        if self.scheme == "plain":
            scores["macro_f1"] = float(f1_score(flat[1], flat[0], average="macro", zero_division=0))
        else:
            scores |= span_scores(tagged, true)
        return scores | {"words_lost": float(lost)}

    def predict(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, *, batch_size: int = 32, progress: bool = False
    ) -> list[dict[str, Any]]:
        bare = rows.remove_columns([name for name in rows.column_names if name != self.column("tokens")])
        tagged, _, _ = self._tag(model, tokenizer, bare, batch_size, "predicting", progress)
        tagged = [to_bio(row) for row in tagged] if self.scheme == "bio" else tagged
        return [{"tokens": words, "tags": tags} for words, tags in zip(self._words(rows), tagged, strict=True)]
