"""What tasks with a label a row share, whatever the row holds: labels from the data, targets, scores and answers.

Labels are names. One label a row is softmax and cross-entropy (accuracy, macro-F1, Matthews correlation); several
(lists, "a,b" with `separator`, or 0/1 columns label=a+b+c) are one sigmoid each (micro- and macro-F1, exact sets);
numbers are least squares (mean squared error, Pearson, Spearman).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import ConfigError, DataError, did_you_mean
from inlay.tasks import columns as named_columns
from inlay.tasks.batches import Pass
from inlay.tasks.class_metrics import multi_label_scores, regression_scores, single_label_scores
from inlay.tasks.columns import parts, values
from inlay.tasks.data import place, source_name
from inlay.tasks.labels import as_number, check_known, label_name, sort_labels
from inlay.tasks.loading import load_pretrained
from inlay.tasks.task import Collator, Task

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Something to a label. Subclasses say what the something is: `guess`, `auto`, `given`, `inputs`, `batcher`."""

    labels: tuple[str, ...] | None = None
    """The classes in the order of the model's outputs; collected from the training rows when None."""
    problem_type: str | None = None
    """"single_label_classification", "multi_label_classification" or "regression"; told from the labels when None."""
    separator: str | None = None
    """What stands between the labels in one string ("a,b"); makes the task multi-label."""
    threshold: float = 0.5
    """Multi-label: the probability from which a label is predicted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (SINGLE, MULTI, REGRESSION)
        if self.problem_type is not None and self.problem_type not in known:
            raise ConfigError(
                f"problem_type {self.problem_type!r} is none of {', '.join(known)}"
                f"{did_you_mean(self.problem_type, known)}"
            )

    # -- what the rows hold ------------------------------------------------------------------------------------------

    def auto(self) -> Any:
        """transformers' auto class of models with the right head."""
        raise NotImplementedError

    def check(self, rows: Dataset) -> None:
        """Raise DataError, naming file and line, for the first row that cannot be an input."""
        self.given(rows)

    def given(self, rows: Dataset) -> list[dict[str, Any]]:
        """What a prediction repeats of its row."""
        raise NotImplementedError

    def inputs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """The rows as features, without labels."""
        raise NotImplementedError

    def batcher(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
        """The collator of what `inputs` gives, for a tokenizer and a model that are known to fit."""
        raise NotImplementedError

    # -- from the data -----------------------------------------------------------------------------------------------

    @override
    def complete(self, splits: Mapping[str, Dataset]) -> Self:
        for rows in splits.values():
            self.check(rows)
        if self.labels is not None or (self.problem_type == REGRESSION and "train" not in splits):
            task = self if self.problem_type else dataclasses.replace(self, problem_type=self._problem(splits))
        else:
            if "train" not in splits:
                raise DataError(
                    "the labels come from the training rows, and there are none: give a train split, or labels=…"
                )
            task = self._with_labels(splits["train"], self._problem(splits))
        for split, rows in splits.items():
            targets = task._targets(rows)
            if targets is None and split != "test":
                raise DataError(
                    f"{source_name(rows)}: the {split} rows have no labels (column {task.column('label')!r})"
                )
            if targets is not None and task.problem_type != REGRESSION:
                assert task.labels is not None
                check_known(targets, task.labels, rows, split, from_train=self.labels is None)
        return task

    def _problem(self, splits: Mapping[str, Dataset]) -> str:
        """The problem type as given, or as the labels' shape tells it."""
        if self.problem_type is not None:
            return self.problem_type
        rows = splits.get("train", next(iter(splits.values())))
        found = parts(rows, self.column("label"))
        if self.separator is not None or len(found) > 1:
            return MULTI
        cells = [cell for cell in values(rows, found[0], "label") if cell is not None]
        if any(isinstance(cell, list) for cell in cells):
            return MULTI
        numbers = [as_number(cell) for cell in cells]
        fractions = all(number is not None for number in numbers) and any(number % 1 for number in numbers)  # type: ignore[operator]
        return REGRESSION if fractions else SINGLE

    def _with_labels(self, rows: Dataset, problem: str) -> Self:
        task = dataclasses.replace(self, problem_type=problem)
        if problem == REGRESSION:
            return task
        found = parts(rows, self.column("label"))
        targets = task._targets(rows)
        if targets is None:
            raise DataError(f"{source_name(rows)}: the label column {self.column('label')!r} is empty in every row")
        used = sort_labels(name for names in targets for name in names)
        if problem == SINGLE and len(used) < 2:
            raise DataError(f"{source_name(rows)}: every row has the label {used[0]!r}, so there is nothing to learn")
        if not used:
            raise DataError(f"{source_name(rows)}: no row has any label")
        names = tuple(found) if len(found) > 1 else named_columns.class_names(rows, found[0])
        return dataclasses.replace(task, labels=names or used)

    @override
    def details(self) -> str:
        names = list(self.labels or ())
        shown = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
        return f"labels: {shown} ({self.problem_type})" if names else f"labels: numbers ({self.problem_type})"

    # -- reading rows ------------------------------------------------------------------------------------------------

    def _targets(self, rows: Dataset) -> list[Any] | None:
        """Row by row the label names (one, or several), or the number; None where the rows have no labels."""
        column = self.column("label")
        names = parts(rows, column)
        if any(name not in rows.column_names for name in names):
            return None
        if len(names) > 1:
            return self._flags(rows, names)
        cells = values(rows, names[0], "label")
        if all(cell is None for cell in cells):
            return None
        return [self._target(cell, rows, index) for index, cell in enumerate(cells)]

    def _target(self, cell: Any, rows: Dataset, index: int) -> Any:
        if self.problem_type == REGRESSION:
            number = as_number(cell)
            if number is None:
                raise DataError(f"{place(rows, index)}: the label {cell!r} is not a number, which regression needs")
            return number
        if cell is None or (cell == "" and self.problem_type == SINGLE):
            raise DataError(
                f"{place(rows, index)}: the label (column {self.column('label')!r}) is "
                f"{'null' if cell is None else 'empty'}; fill it or leave the row out"
            )
        if self.problem_type == SINGLE:
            if isinstance(cell, list):
                raise DataError(f"{place(rows, index)}: the label is a list; set task.problem_type={MULTI}")
            return [label_name(cell)]
        if isinstance(cell, str):
            cell = [part.strip() for part in cell.split(self.separator)] if self.separator else [cell]
        return [label_name(item) for item in (cell if isinstance(cell, list) else [cell]) if item not in (None, "")]

    def _flags(self, rows: Dataset, names: list[str]) -> list[list[str]]:
        """Labels from one 0/1 column each."""
        table = {
            name: [as_number(int(cell) if isinstance(cell, bool) else cell) for cell in rows[name][:]] for name in names
        }
        for name, cells in table.items():
            wrong = next((index for index, cell in enumerate(cells) if cell not in (0.0, 1.0)), None)
            if wrong is not None:
                raise DataError(
                    f"{place(rows, wrong)}: label column {name!r} holds {rows[wrong][name]!r}; 0 or 1 is needed"
                )
        return [[name for name in names if table[name][index]] for index in range(len(rows))]

    # -- the model ---------------------------------------------------------------------------------------------------

    @property
    @override
    def primary_metric(self) -> tuple[str, bool]:
        return {MULTI: ("micro_f1", True), REGRESSION: ("mse", False)}.get(
            self.problem_type or SINGLE, ("accuracy", True)
        )

    @override
    def load_model(self, model: str | Path, **kwargs: Any) -> PreTrainedModel:
        names = self._resolved_labels()
        return load_pretrained(
            self.auto(),
            model,
            purpose=self.kind,
            new_head=True,
            num_labels=max(1, len(names)),
            problem_type=self.problem_type,
            id2label=dict(enumerate(names)) or {0: "value"},
            label2id={name: i for i, name in enumerate(names)} or {"value": 0},
            **kwargs,
        )

    def _resolved_labels(self) -> tuple[str, ...]:
        if self.problem_type is None or (self.labels is None and self.problem_type != REGRESSION):
            raise ConfigError(f"{self.kind} does not know its labels yet: call resolve(splits) first, or give labels=…")
        return self.labels or ()

    # -- rows to batches to results ----------------------------------------------------------------------------------

    @override
    def features(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, train: bool) -> Dataset:
        names = self._resolved_labels()
        found, targets = self.inputs(rows, tokenizer), self._targets(rows)
        if targets is None and train:
            raise DataError(f"{source_name(rows)} has no column {self.column('label')!r} to train on")
        if targets is not None and self.problem_type != REGRESSION:
            check_known(targets, names, rows, "train" if train else "given", from_train=True)
            ids = {name: index for index, name in enumerate(names)}
            if self.problem_type == SINGLE:
                targets = [ids[found] for (found,) in targets]
            else:
                targets = [[float(name in found) for name in names] for found in targets]
        return found if targets is None else found.add_column("labels", targets)

    @override
    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
        self.check_fit(model, tokenizer)
        return self.batcher(tokenizer, model)

    @override
    def labelled(self, rows: Dataset) -> bool:
        return self._targets(rows) is not None

    def _outputs(self, features: Dataset, through: Pass) -> torch.Tensor:
        """Logits of every row, in the order of the rows: float32 (rows, classes)."""
        outputs = torch.empty(len(features), max(1, len(self._resolved_labels())))
        for indices, batch in through.batches(features, self.batcher(through.tokenizer, through.model)):
            batch.pop("labels", None)
            outputs[indices] = through.model(**batch).logits.float().cpu()
        return outputs

    @override
    def scores(self, rows: Dataset, through: Pass) -> dict[str, float]:
        features = self.features(rows, through.tokenizer, train=False)
        if "labels" not in features.column_names:
            raise DataError(f"{source_name(rows)} has no labels to evaluate with (column {self.column('label')!r})")
        outputs, targets = self._outputs(features, through), torch.tensor(features["labels"][:])
        if self.problem_type == REGRESSION:
            return regression_scores(outputs[:, 0].double().numpy(), targets.double().numpy())
        if self.problem_type == MULTI:
            loss = functional.binary_cross_entropy_with_logits(outputs, targets.float()).item()
            chosen = (outputs.sigmoid() >= self.threshold).int().numpy()
            return {"loss": loss} | multi_label_scores(chosen, targets.int().numpy())
        loss = functional.cross_entropy(outputs, targets).item()
        return {"loss": loss} | single_label_scores(outputs.argmax(-1).numpy(), targets.numpy())

    @override
    def answers(self, rows: Dataset, through: Pass) -> list[dict[str, Any]]:
        names, given = self._resolved_labels(), self.given(rows)
        outputs = self._outputs(self.inputs(rows, through.tokenizer), through)
        if self.problem_type == REGRESSION:
            return [row | {"value": value} for row, value in zip(given, outputs[:, 0].tolist(), strict=True)]
        if self.problem_type == MULTI:
            lines = [dict(zip(names, line, strict=True)) for line in outputs.sigmoid().tolist()]
            chosen = [[name for name, score in line.items() if score >= self.threshold] for line in lines]
            return [
                row | {"labels": found, "scores": line} for row, found, line in zip(given, chosen, lines, strict=True)
            ]
        best, classes = outputs.softmax(-1).max(-1)
        found = zip(given, classes.tolist(), best.tolist(), strict=True)
        return [row | {"label": names[number], "score": score} for row, number, score in found]
