"""Rows that name files, or hold what a file would: images and sounds, found beside the data file that names them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from datasets import Audio, Dataset, Image

from inlay.errors import DataError, did_you_mean
from inlay.tasks.columns import LABEL, cannot_guess, named, other_columns, parts, require
from inlay.tasks.data import origin, place


def guess_media(
    rows: Dataset, given: Mapping[str, str], role: str, names: Sequence[str], feature: type
) -> dict[str, str]:
    """The columns of `role` and of the label. Raises DataError where either cannot be told.

    A column that a hub data set declares to be of this `feature` comes first, then one of `names`.
    """
    found = dict(given)
    taken = [part for column in found.values() for part in parts(rows, column)]
    if role not in found:
        declared = [name for name, kind in rows.features.items() if isinstance(kind, feature) and name not in taken]
        column = declared[0] if declared else named(rows, names, without=taken)
        if column is None:
            raise cannot_guess(rows, role)
        found[role] = column
        taken.append(column)
    if "label" not in found:
        label, left = named(rows, LABEL, without=taken), other_columns(rows, without=taken)
        if label is None and len(left) != 1:
            raise cannot_guess(rows, "label")
        found["label"] = label or left[0]
    return {name: found[name] for name in (role, "label")}


def media(rows: Dataset, column: str, role: str) -> Dataset:
    """The rows with one column, called `role`: paths made whole, encoded bytes, or nested lists of numbers.

    A path is relative to the folder of the data file, or to the working directory where no file is known.
    Raises DataError, naming file and line, for a null and for a path with no file.
    """
    require(rows, column, role)
    if isinstance(rows.features[column], Image | Audio):  # as its bytes: what decodes them is the task's own affair
        rows = rows.cast_column(column, type(rows.features[column])(decode=False))
    one = rows.select_columns([column]).rename_column(column, role) if column != role else rows.select_columns([role])
    cells = rows[column][:]
    base = origin(rows)
    folder = Path() if base is None or not base.parent.is_dir() else base.parent  # a mixture has no folder of its own
    whole = [_whole(cell, folder) for cell in cells]
    for index, cell in enumerate(whole):
        if cell is None or cell == "":
            what = "null" if cell is None else "empty"
            raise DataError(
                f"{place(rows, index)}: the {role} (column {column!r}) is {what}; fill it or leave the row out"
            )
        if isinstance(cell, str) and not Path(cell).is_file():
            raise DataError(_no_file(rows, index, role, column, cell))
    return Dataset.from_dict({role: whole}) if any(isinstance(cell, str) for cell in whole) else one


def read(cell: Any, reader: Callable[[BinaryIO], Any]) -> Any:
    """`reader` on an open file: the one at a path, or encoded bytes."""
    if isinstance(cell, str):
        with Path(cell).open("rb") as stream:
            return reader(stream)
    return reader(io.BytesIO(cell["bytes"]))


def shown(cell: Any) -> str:
    """A path, or what stands for it in messages."""
    if isinstance(cell, str):
        return cell
    return str(cell.get("path") or "its bytes") if isinstance(cell, Mapping) else "its numbers"


def beside(rows: Sequence[Mapping[str, Any]], role: str) -> dict[str, torch.Tensor]:
    """The other columns of a batch, stacked: labels, and numbers of tasks."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0] if name != role}


def named_rows(rows: Dataset, column: str, role: str) -> list[dict[str, Any]]:
    """What predictions repeat: the path as the row has it, or the row's number."""
    feature = rows.features[column] if column in rows.column_names else None
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return [{role: cell} for cell in rows[column][:]]
    return [{"row": index} for index in range(len(rows))]


def _whole(cell: Any, folder: Path) -> Any:
    if isinstance(cell, Mapping) and cell.get("bytes") is None:
        cell = cell.get("path")
    if isinstance(cell, str) and cell:
        return str(folder / Path(cell).expanduser())
    return cell


def _no_file(rows: Dataset, index: int, role: str, column: str, cell: str) -> str:
    path = Path(cell)
    folder = path.parent
    near = (
        did_you_mean(path.name, (entry.name for entry in folder.iterdir()))
        if folder.is_dir()
        else f" (there is no folder {folder} either)"
    )
    return f"{place(rows, index)}: the {role} (column {column!r}) is to be {cell}, and there is no such file{near}"
