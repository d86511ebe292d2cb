"""Token classification: a tag for every word, as in named entities (BIO spans) or parts of speech (one class a word).

A word's tag stands at its first sub-token; the others carry no label. Words that truncation cuts off, or that the
tokenizer drops, are predicted "O" (the first tag where there is no O) and counted in "words_lost".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import ConfigError, DataError
from inlay.tasks import columns as named_columns
from inlay.tasks.batches import IGNORE, Pass, check_fit, length_limit, padder, summed_loss
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
    """The tags in the order of the model's outputs; from the training rows (B- and I- of each type) when None."""
    scheme: str | None = None
    """'bio' (spans: span F1) or 'plain' (a class a word: accuracy); told from the tags when None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme not in (None, "bio", "plain"):
            raise ConfigError(f"scheme {self.scheme!r} is neither 'bio' nor 'plain'")

    # -- from the data -----------------------------------------------------------------------------------------------

    @override
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

    @override
    def complete(self, splits: Mapping[str, Dataset]) -> Self:
        task = self
        if self.labels is None:
            if "train" not in splits:
                raise DataError("the tags come from the training rows, of which there are none: give a train split")
            rows, column = splits["train"], self.column("tags")
            tags = self._tags(rows)
            if tags is None:
                raise DataError(f"{source_name(rows)}: the training rows have no tags (column {column!r})")
            used = {tag for row in tags for tag in row}
            scheme = self.scheme or ("bio" if is_span_scheme(used) else "plain")
            names = named_columns.class_names(rows, column) if scheme == "plain" else close_labels(used)
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

    @override
    def details(self) -> str:
        return f"tags: {', '.join(self.labels or ())} ({self.scheme})"

    # -- reading rows ------------------------------------------------------------------------------------------------

    def _words(self, rows: Dataset) -> list[list[str]]:
        cells = values(rows, self.column("tokens"), "tokens")
        for index, words in enumerate(cells):
            if not isinstance(words, list) or not words or any(not isinstance(word, str) for word in words):
                what = "empty" if not words else "not a list of strings"
                raise DataError(
                    f"{place(rows, index)}: the tokens (column {self.column('tokens')!r}) are {what}; "
                    f"mend the row or leave it out"
                )
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
                raise DataError(
                    f"{place(rows, index)}: {len(words)} tokens and {found} (column {column!r}); "
                    f"each token needs one tag"
                )
            named.append([label_name(tag) for tag in tags])
        spans = self.scheme == "bio" or (self.scheme is None and is_span_scheme(tag for row in named for tag in row))
        return [to_bio(row) for row in named] if spans else named

    # -- the model ---------------------------------------------------------------------------------------------------

    @property
    @override
    def primary_metric(self) -> tuple[str, bool]:
        return ("accuracy", True) if self.scheme == "plain" else ("f1", True)

    @override
    def load_tokenizer(self, model: str | Path) -> PreTrainedTokenizerBase:
        """A tokenizer that keeps track of words; those that mark a word by the space before it are told to add one."""
        tokenizer = load_tokenizer(model)
        if getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = load_tokenizer(model, add_prefix_space=True)
        if not tokenizer.is_fast:
            raise ConfigError(f"the tokenizer of {model} cannot tell words from sub-tokens (it is not a fast one)")
        return tokenizer

    @override
    def load_model(self, model: str | Path, **kwargs: Any) -> PreTrainedModel:
        names = self._resolved_labels()
        return load_pretrained(
            AutoModelForTokenClassification,
            model,
            purpose=self.kind,
            new_head=True,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            **kwargs,
        )

    def _resolved_labels(self) -> tuple[str, ...]:
        if self.labels is None:
            raise ConfigError(f"{self.kind} does not know its tags yet: call resolve(splits) first, or give labels=…")
        return self.labels

    # -- rows to batches to results ----------------------------------------------------------------------------------

    def _encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[dict[str, Any], list[list[int | None]]]:
        """Tokenised rows, and for each token the number of the word that it begins (None for all other tokens)."""
        limit = length_limit(tokenizer, self.max_length)
        encoded = tokenizer(self._words(rows), is_split_into_words=True, truncation=True, max_length=limit)
        firsts = []
        for index in range(len(rows)):
            words = encoded.word_ids(index)
            pairs = zip([None, *words], words, strict=False)
            firsts.append([word if word != before else None for before, word in pairs])
        return dict(encoded), firsts

    @override
    def features(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, train: bool) -> Dataset:
        encoded, firsts = self._encode(rows, tokenizer)
        tags = self._tags(rows)
        if tags is None and train:
            raise DataError(f"{source_name(rows)} has no column {self.column('tags')!r} to train on")
        if tags is not None:
            names = self._resolved_labels()
            check_known(tags, names, rows, "train" if train else "given", from_train=True)
            ids = {name: index for index, name in enumerate(names)}
            pairs = zip(firsts, tags, strict=True)
            encoded["labels"] = [[IGNORE if word is None else ids[row[word]] for word in first] for first, row in pairs]
        return Dataset.from_dict(encoded)

    @override
    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
        check_fit(model, tokenizer, self.max_length)
        return padder(tokenizer, model, labels=IGNORE)

    @override
    def labelled(self, rows: Dataset) -> bool:
        return self._tags(rows) is not None

    def _tagged(self, rows: Dataset, through: Pass) -> tuple[list[list[str]], int, float]:
        """Tags of all words, how many words the model never saw, and the mean loss of those it saw (0 without tags)."""
        names, tokenizer = self._resolved_labels(), through.tokenizer
        features, (_, firsts) = self.features(rows, tokenizer, train=False), self._encode(rows, tokenizer)
        found = [[OUTSIDE if OUTSIDE in names else names[0]] * len(words) for words in self._words(rows)]
        total, count = 0.0, 0
        for indices, batch in through.batches(features, padder(tokenizer, through.model, labels=IGNORE)):
            labels = batch.pop("labels", None)
            width = batch["input_ids"].shape[1]
            logits = through.model(**batch).logits[:, -width:].float()  # without soft prompts, if any
            if labels is not None:
                total += summed_loss(logits, labels)
                count += int((labels != IGNORE).sum())
            for index, best in zip(indices, logits.argmax(-1).tolist(), strict=True):
                for word, label in zip(firsts[index], best, strict=False):
                    if word is not None:
                        found[index][word] = names[label]
        seen = sum(word is not None for row in firsts for word in row)
        return found, sum(len(row) for row in found) - seen, total / max(count, 1)

    @override
    def scores(self, rows: Dataset, through: Pass) -> dict[str, float]:
        true = self._tags(rows)
        if true is None:
            raise DataError(f"{source_name(rows)} has no tags to evaluate with (column {self.column('tags')!r})")
        found, lost, loss = self._tagged(rows, through)
        flat = [[tag for row in side for tag in row] for side in (found, true)]
        scores = {"loss": loss, "accuracy": float(accuracy_score(flat[1], flat[0]))}
        if self.scheme == "plain":
            scores["macro_f1"] = float(f1_score(flat[1], flat[0], average="macro", zero_division=0))
        else:
            scores |= span_scores(found, true)
        return scores | {"words_lost": float(lost)}

    @override
    def answers(self, rows: Dataset, through: Pass) -> list[dict[str, Any]]:
        bare = rows.remove_columns([name for name in rows.column_names if name != self.column("tokens")])
        found, _, _ = self._tagged(bare, through)
        tagged = [to_bio(row) for row in found] if self.scheme == "bio" else found
        return [{"tokens": words, "tags": tags} for words, tags in zip(self._words(rows), tagged, strict=True)]
