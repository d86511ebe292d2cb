"""Few-shot splits: a few labelled rows, drawn from many, named by their numbers and a hash.

K means different things in the literature: so many of each class (LM-BFF, SetFit), or so many in all (PET, LiST,
T-Few); here it is said. The development rows, where there are any, are as few.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch

from inlay.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Split:
    """Row numbers of a few-shot split, in the order drawn."""

    train: tuple[int, ...]
    dev: tuple[int, ...]
    rest: tuple[int, ...]
    """The rows that were not drawn, in their own order: unlabelled rows, where no others are given. With groups, those
    of the development and test rows' groups are left out."""
    seed: int
    k: int
    per: str

    @property
    def digest(self) -> str:
        """A hash of which rows were drawn: equal where the splits are."""
        return hashlib.sha256(json.dumps([self.train, self.dev]).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """As a record keeps it."""
        return {"k": self.k, "per": self.per, "seed": self.seed, "train": list(self.train), "dev": list(self.dev),
                "digest": self.digest}  # fmt: skip


def few_shot_split(
    labels: Sequence[str],
    k: int,
    *,
    per: Literal["class", "total"] = "class",
    dev: int | Literal["same"] = 0,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
    apart: Collection[Any] = (),
) -> Split:
    """Draw `k` rows of each class, or in all, and `dev` more ("same": as many) that share none with them.

    `groups` (an article, a speaker) never stand on both sides: no row of train or rest has a group of a row of dev, and
    rows of the groups `apart` (those of test rows) are in no part. Raises DataError when there are too few.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigError(f"shots={k!r}: a whole number of at least 1 is needed")
    if per not in ("class", "total"):
        raise ConfigError(f"per={per!r}: shots are counted per class or in total")
    if dev != "same" and (isinstance(dev, bool) or not isinstance(dev, int) or dev < 0):
        raise ConfigError(f"dev={dev!r}: a whole number of rows is needed, or 'same' for as many as there are shots")
    if apart and groups is None:
        raise ConfigError("apart names groups that are not to be drawn from: say each row's group too, groups=[…]")
    wanted = k if dev == "same" else dev
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    other = "" if groups is None else " of groups that are on no other side"
    order = [i for i in order if groups is None or groups[i] not in apart]
    train = _draw(order, labels, k, per, other)
    taken = {groups[index] for index in train} if groups is not None else set()
    drawn = set(train)
    left = [i for i in order if i not in drawn and (groups is None or groups[i] not in taken)]
    held = _draw(left, labels, wanted, per, other) if wanted else []
    drawn |= set(held)
    kept = {groups[index] for index in held} if groups is not None else set()
    rest = [i for i in sorted(order) if i not in drawn and (groups is None or groups[i] not in kept)]
    return Split(tuple(train), tuple(held), tuple(rest), seed, k, per)


def _draw(order: Sequence[int], labels: Sequence[str], k: int, per: str, other: str) -> list[int]:
    if per == "total":
        if len(order) < k:
            raise DataError(f"{k} rows are to be drawn, and there are {len(order)}{other}: fewer shots, or more rows")
        return list(order[:k])
    by_label: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
    for index in order:
        if len(by_label[labels[index]]) < k:
            by_label[labels[index]].append(index)
    for label, rows in by_label.items():
        if len(rows) < k:
            raise DataError(
                f"{k} rows of each label are to be drawn, and {label!r} has {len(rows)} left{other}: fewer shots, or "
                "more rows"
            )
    return [index for rows in by_label.values() for index in rows]
