"""Rows of several sources (languages, domains) mixed for training, small ones more often than they are.

    p_i ∝ n_i^(1/T)        T = 1: as they are; T → ∞: all alike; T = 3.3 is the α = 0.3 of XLM-R

Devlin 2018, multilingual BERT (α = 1/T = 0.7); Conneau et al. 2020, arXiv:1911.02116 (0.3); Arivazhagan et al. 2019,
arXiv:1907.05019 (temperature). Here an epoch holds every row at least once: the source that its share cuts most once,
all others again and again, p_i of the epoch each. So nothing is drawn while training, and a resumed run is the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from inlay.errors import ConfigError, DataError
from inlay.tasks.data import ORIGIN, read_rows, source_name


def shares(sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """p_i by source. Raises ConfigError for a temperature that is not above 0."""
    if not isinstance(temperature, int | float) or isinstance(temperature, bool) or not 0 < temperature < math.inf:
        raise ConfigError(f"temperature={temperature!r}: a number above 0 is needed, such as 3")
    largest = max(sizes.values())
    weights = {name: (size / largest) ** (1 / temperature) for name, size in sizes.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def epoch(sizes: Mapping[str, int], temperature: float) -> dict[str, int]:
    """Rows of each source in an epoch: p_i of it, and at least all that there are."""
    p = shares(sizes, temperature)
    total = max(size / p[name] for name, size in sizes.items())
    return {name: max(size, round(p[name] * total)) for name, size in sizes.items()}


def mix(
    sources: Mapping[str, str | Path | Dataset],
    *,
    split: str = "train",
    temperature: float = 1.0,
    seed: int = 0,
    named: str | None = None,
) -> Dataset:
    """The rows of all sources, by name, in the proportions of `epoch`; of folders, those of the split.

    `named`: a further column, which holds the name of each row's source. Only columns that all have are kept. Raises
    DataError where there are none, or where they do not hold the same.
    """
    if not sources:
        raise DataError(f"the {split} rows are a mixture of nothing: name at least one file")
    read = {
        name: source if isinstance(source, Dataset) else read_rows(source, split=split)
        for name, source in sources.items()
    }
    first = next(iter(read.values()))
    shared = [column for column in first.column_names if all(column in rows.column_names for rows in read.values())]
    if not shared:
        raise DataError(f"the mixture of {', '.join(read)} has no column in common: name the text column alike in all")
    counts = epoch({name: len(rows) for name, rows in read.items()}, temperature)
    parts = [repeated(rows.select_columns(shared), counts[name], f"{seed}:{name}") for name, rows in read.items()]
    kinds = [{column: str(rows.features[column]) for column in shared} for rows in parts]
    for rows, kind in zip(read.values(), kinds, strict=True):
        for column in shared:
            if kind[column] != kinds[0][column]:
                raise DataError(
                    f"{source_name(rows)}: column {column!r} holds {kind[column]}, and {kinds[0][column]} in "
                    f"{source_name(first)}: one mixture needs one kind"
                )
    if named is not None:
        parts = [rows.add_column(named, [name] * len(rows)) for name, rows in zip(read, parts, strict=True)]
    mixed = concatenate_datasets(parts)
    mixed.info.description = f"{ORIGIN}the mixture of {', '.join(read)}"
    return mixed


def repeated(rows: Dataset, count: int, key: Any) -> Dataset:
    """`count` rows: each as often as all fit in, and a drawn part of them once more."""
    whole, rest = divmod(count, len(rows))
    again = random.Random(key).sample(range(len(rows)), rest)
    return rows.select([*range(len(rows))] * whole + sorted(again))
