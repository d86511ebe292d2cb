"""Runs whose method learns several tasks at once: which rows are of which, and how many tasks there are.

The rows say it in a column (`task_id_column`), or, where the training data is a mixture, by the source that they are
from. How many there are is the method's own field, filled in from the training rows where it is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from inlay.engine.registry import method_class
from inlay.errors import ConfigError
from inlay.tasks.task_ids import SOURCE, all_of, ids_of, task_names
from inlay.train.run import Run


def task_column(run: Run) -> str | None:
    """The column that says each row's task; None where no method asks. ConfigError where one asks and nothing says."""
    fields_of = {str(fields["kind"]): fields for fields in run.method}
    asking = {kind: (field, fields_of[kind]) for kind in fields_of if (field := method_class(kind).tasks_field)}
    if run.task_id_column is not None:
        if not asking:
            kinds = ", ".join(str(fields["kind"]) for fields in run.method)
            raise ConfigError(f"task_id_column={run.task_id_column!r}: {kinds} learns no several tasks; leave it out")
        return run.task_id_column
    open_ones = {kind: fields.get(field) for kind, (field, fields) in asking.items() if fields.get("task") is None}
    if isinstance(run.data.train, Mapping) and any(count != 1 for count in open_ones.values()):
        return SOURCE
    for kind, count in open_ones.items():
        if count is not None and count != 1:
            raise ConfigError(
                f"{kind} learns {count} tasks, and nothing says which a row is of: --task-id-column NAME, or the rows "
                "of each task as a source of its own, data.train: {name: file, name: file}"
            )
    return None


def hidden(splits: Mapping[str, Any], column: str | None) -> dict[str, Any]:
    """The splits without that column, so that no role is guessed into it."""
    return {
        split: rows.remove_columns([column]) if column in rows.column_names else rows for split, rows in splits.items()
    }


def told(run: Run, task: Any, splits: Mapping[str, Any], column: str | None) -> tuple[Run, Any]:
    """The run and its task with the tasks that the training rows are of. DataError for a split that does not say."""
    if column is None:
        return run, task
    names = task_names(splits["train"], column)
    task = dataclasses.replace(task, task_id_column=column, task_names=names)
    for rows in splits.values():
        ids_of(task, rows)
    methods = []
    for fields in run.method:
        field = method_class(fields["kind"]).tasks_field
        given = None if field is None else fields.get(field)
        given = len(names) if given is None else given
        if isinstance(given, int) and given < len(names):  # what is no number the method itself refuses
            raise ConfigError(
                f"{fields['kind']} has {field}={given}, and the rows are of {len(names)} tasks ({', '.join(names)}): "
                f"set method.{field}={len(names)}, or leave it out"
            )
        methods.append(fields if field is None else {**fields, field: given})
    return run.replace(method=methods), task


def asked(task: Any, rows: Any, task_id: str | None, column: str | None) -> tuple[Any, Any]:
    """Task and rows where the user says it for all rows, or names another column. ConfigError for a run of one task."""
    if task_id is None and column is None:
        return task, rows
    if task.task_id_column is None:
        raise ConfigError("the run's method learns one task: leave task_id and task_id_column out")
    if column is not None:
        return dataclasses.replace(task, task_id_column=column), rows
    return dataclasses.replace(task, task_id_column=SOURCE), all_of(rows, str(task_id))
