"""Names of classes: collecting them from training rows, ordering them, and catching one that training does not have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset

from inlay.errors import DataError, did_you_mean
from inlay.tasks.data import place


def label_name(value: Any) -> str:
    """A class's name as a string; 1.0 (a whole number that a gap in its column made a float) is "1"."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Names in a fixed order: by value when all are numbers ("2" before "10"), by spelling otherwise."""
    distinct = sorted(set(names))
    numbers = [as_number(name) for name in distinct]
    if all(number is not None for number in numbers):
        return tuple(name for _, name in sorted(zip(numbers, distinct, strict=True)))
    return tuple(distinct)


def as_number(value: Any) -> float | None:
    """A finite float, or None where the value (a number, or a string of one) is not that."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def check_known(
    found: Sequence[Iterable[str]], labels: Sequence[str], rows: Dataset, split: str, from_train: bool
) -> None:
    """Raise DataError at the first row of `found` (names, row by row) with a label that is not among `labels`."""
    known = frozenset(labels)
    for index, names in enumerate(found):
        for name in names:
            if name not in known:
                of = "the training rows have" if from_train else "the task has"
                shown = ", ".join(labels[:12]) + (", …" if len(labels) > 12 else "")
                raise DataError(
                    f"{place(rows, index)}: the {split} label {name!r} is not one that {of}"
                    f"{did_you_mean(name, labels)}; labels: {shown}"
                )
