"""Which task each row is of, for methods that learn several at once: a column's values, as the numbers 0 to n − 1.

A model with such a method takes `task_ids`, one for each row of a batch. Features carry them; where a pass makes its
own batches (generation), `inlay.for_tasks` says them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset, concatenate_datasets

from inlay.errors import DataError, did_you_mean
from inlay.tasks.columns import values
from inlay.tasks.data import place, source_name
from inlay.tasks.labels import label_name, sort_labels

if TYPE_CHECKING:
    from inlay.tasks.task import Task

SOURCE = "inlay_source"
"""The column that says which source of a mixture a row is from."""
IDS = "task_ids"


def task_names(rows: Dataset, column: str) -> tuple[str, ...]:
    """The tasks that the rows are of, in the order of their numbers: sorted, those of a mixture as it names them."""
    found = [label_name(cell) for cell in _cells(rows, column)]
    return tuple(dict.fromkeys(found)) if column == SOURCE else tuple(sort_labels(found))


def _cells(rows: Dataset, column: str) -> list[Any]:
    if column not in rows.column_names:
        what = "come from one source" if column == SOURCE else f"have no column {column!r}"
        fix = "name their sources as the training rows' are" if column == SOURCE else "add it"
        raise DataError(
            f"{source_name(rows)}: the rows do not say which task they are of (they {what}"
            f"{did_you_mean(column, rows.column_names)}): {fix}; or, to evaluate or predict, "
            "say it for all of them (--task-id NAME)"
        )
    cells = values(rows, column, "task")
    empty = next((row for row, cell in enumerate(cells) if cell in (None, "")), None)
    if empty is not None:
        raise DataError(f"{place(rows, empty)}: the row names no task (column {column!r})")
    return cells


def ids_of(task: Task, rows: Dataset) -> list[int] | None:
    """The number of each row's task; None where the run's method asks for none. DataError for one that is unknown."""
    if task.task_id_column is None:
        return None
    numbers = {name: number for number, name in enumerate(task.task_names)}
    found = [label_name(cell) for cell in _cells(rows, task.task_id_column)]
    wrong = next((row for row, name in enumerate(found) if name not in numbers), None)
    if wrong is not None:
        raise DataError(
            f"{place(rows, wrong)}: there is no task {found[wrong]!r}{did_you_mean(found[wrong], numbers)}; the run "
            f"was trained on: {', '.join(numbers)}"
        )
    return [numbers[name] for name in found]


def all_of(rows: Dataset, name: str) -> Dataset:
    """The rows, all of one task."""
    kept = rows.remove_columns([column for column in (SOURCE,) if column in rows.column_names])
    told = kept.add_column(SOURCE, [name] * len(kept))
    told.info.description = rows.info.description
    return told


def with_ids(features: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """A task's `features`, which then carry task ids: made for the rows of each task by itself, so that whatever an
    example is made of, it is of one task.
    """

    @functools.wraps(features)
    def carrying(self: Any, rows: Dataset, tokenizer: Any, *, train: bool) -> Dataset:
        if self.task_id_column is None or self.task_id_column not in rows.column_names:
            return features(self, rows, tokenizer, train=train)
        ids, alone = ids_of(self, rows) or [], dataclasses.replace(self, task_id_column=None, task_names=())
        made, order = [], list[int]()
        for number in sorted(set(ids)):
            mine = [row for row, one in enumerate(ids) if one == number]
            part = features(alone, rows.select(mine), tokenizer, train=train)
            made.append(part.add_column(IDS, [number] * len(part)))
            order += mine
        whole = concatenate_datasets(made)
        if len(whole) != len(rows):  # an example a row no longer, so there is no order of rows to keep
            return whole
        back = sorted(range(len(order)), key=order.__getitem__)
        return whole.select(back)

    return carrying


@contextlib.contextmanager
def telling(model: Any, ids: Sequence[int] | None, group: Sequence[int], batch: Any, count: int) -> Iterator[None]:
    """Within the block the model knows the tasks of this batch's rows, where the batch itself does not say them."""
    if ids is None or IDS in batch or count != len(ids):
        yield
        return
    from inlay.pieces.prompts.tasks import for_tasks

    with for_tasks(model, [ids[row] for row in group]):
        yield
