"""Rows that belong together (an article's sentences, a speaker's turns), and stand on one side of a split alone.

What is learned from, labelled or not, what is chosen by and what is measured on are the sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from inlay.errors import DataError, did_you_mean
from inlay.fewshot.splits import Split
from inlay.tasks.data import place, source_name
from inlay.tasks.labels import label_name


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups of a run's rows, by name; 1 and "1" are one group."""

    column: str
    train: tuple[str, ...]
    """Of each row of the file that rows are drawn from."""
    test: frozenset[str]
    """Those of the test rows."""

    @classmethod
    def read(cls, column: str, train: Dataset, test: Dataset | None) -> Groups:
        """From the rows. Raises DataError where either lack the column, or a row a value of it."""
        return cls(column, _named(train, column), frozenset(_named(test, column) if test is not None else ()))

    def without(self, rows: Sequence[Mapping[str, Any]], split: Split) -> list[Mapping[str, Any]]:
        """The given unlabelled rows without those of a group of the development or test rows."""
        others = self.test | {self.train[index] for index in split.dev}
        return [row for row in rows if row.get(self.column) is None or label_name(row[self.column]) not in others]

    def to_dict(self, split: Split) -> dict[str, Any]:
        """As a record keeps it: the groups of the rows drawn, and how many the test rows have."""
        drawn = {side: sorted({self.train[i] for i in getattr(split, side)}) for side in ("train", "dev")}
        return {"column": self.column, **drawn, "test": len(self.test)}


def _named(rows: Dataset, column: str) -> tuple[str, ...]:
    if column not in rows.column_names:
        raise DataError(
            f"{source_name(rows)} has no column {column!r} to group rows by"
            f"{did_you_mean(column, rows.column_names)}; it has: {', '.join(rows.column_names)}. Choose one with "
            "--group-column NAME"
        )
    found = rows[column][:]
    for index, value in enumerate(found):
        if value is None:
            raise DataError(f"{place(rows, index)} has no {column!r}, by which rows are to be grouped: give it one")
    return tuple(map(label_name, found))
