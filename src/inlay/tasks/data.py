"""Where rows come from: a file, a folder of splits, a mapping, a `datasets` object or a hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset, DatasetDict, DatasetInfo, load_dataset, load_from_disk
from datasets.table import InMemoryTable

from inlay.errors import DataError, did_you_mean
from inlay.tasks.readers import LINE_READERS, UNSAFE, data_suffix, line_of, read_table

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""The three splits and the names they go by."""

Source: TypeAlias = "str | Path | Mapping[str, Any] | Dataset | DatasetDict"

_SUFFIXES = frozenset(LINE_READERS) | {".parquet"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
ORIGIN = "rows of "  # begins the description of a table that was read from a file


def read_rows(source: Source, *, split: str | None = None) -> Dataset:
    """One table of rows from a file, a folder, a mapping, a `datasets` object or a hub id.

    Where the source has several splits, `split` says which. Raises DataError naming the file and line at fault.
    """
    splits = read_splits(source)
    if split is not None and (len(splits) > 1 or "train" not in splits):
        name = split_name(split)
        if name not in splits:
            raise DataError(f"{_shown(source)} has no split {split!r}; it has: {', '.join(splits)}")
        return splits[name]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise DataError(f"{_shown(source)} has several splits ({', '.join(splits)}): name a file, or give split=…")


def read_splits(source: Source) -> dict[str, Dataset]:
    """The splits of a source, under the keys "train", "validation" and "test" (those that there are, in this order).

    A folder gives its files named train, validation (or valid, val, dev, eval) and test; a single file or `Dataset` is
    "train"; a mapping names its own. The network is asked only for a string that looks like a hub id ("owner/name", or
    a bare name) and is no path. Raises DataError.
    """
    if isinstance(source, Dataset):
        return {"train": source}
    if isinstance(source, Mapping):
        return _ordered({name: _one(value) for name, value in source.items()}, "the mapping")
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return {"train": _file(path)}
    if isinstance(source, str) and _looks_like_hub_id(source):
        return _hub(source)
    raise DataError(f"{source}: no such file or folder{_neighbours(path)}")


def split_name(name: str) -> str:
    """Validation for "dev", and so on. Raises DataError for a name that is none of them."""
    for canonical, names in SPLITS.items():
        if name.lower() in names:
            return canonical
    known = [known for names in SPLITS.values() for known in names]
    raise DataError(f"{name!r} is not the name of a split{did_you_mean(name, known)}; splits: {', '.join(SPLITS)}")


def place(rows: Dataset, index: int) -> str:
    """Where row `index` came from, for messages: "train.csv line 12", or "row 11" where no file is known."""
    path = origin(rows)
    if path is None:
        return f"row {index}"
    indices = getattr(rows, "_indices", None)  # rows were selected or shuffled: find the row of the file
    if indices is not None:
        index = indices.column(0)[index].as_py()
    line = line_of(path, index) if path.is_file() else None
    return f"{path} row {index}" if line is None else f"{path} line {line}"


def origin(rows: Dataset) -> Path | None:
    """The file that the rows were read from, where it is known."""
    description = rows.info.description or ""
    return Path(description.removeprefix(ORIGIN)) if description.startswith(ORIGIN) else None


def source_name(rows: Dataset) -> str:
    """The rows' file, or "the data"."""
    path = origin(rows)
    return "the data" if path is None else str(path)


def _one(value: Any) -> Dataset:
    return value if isinstance(value, Dataset) else read_rows(value)


def _ordered(splits: Mapping[str, Dataset], what: str) -> dict[str, Dataset]:
    named: dict[str, Dataset] = {}
    for name, rows in splits.items():
        canonical = split_name(name)
        if canonical in named:
            raise DataError(f"{what} gives the {canonical} split twice ({', '.join(splits)})")
        if len(rows) == 0:
            raise DataError(f"{what}: the split {name!r} has no rows")
        named[canonical] = rows
    if not named:
        raise DataError(f"{what} gives no split; at least one of {', '.join(SPLITS)} is needed")
    return {name: named[name] for name in SPLITS if name in named}


def _file(path: Path) -> Dataset:
    try:
        table = read_table(path)
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows")
    return Dataset(InMemoryTable(table), info=DatasetInfo(description=f"{ORIGIN}{path}"))


def _folder(folder: Path) -> dict[str, Dataset]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return read_splits(load_from_disk(str(folder)))
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and data_suffix(path) in _SUFFIXES:
            stem = path.name.split(".")[0]
            name = re.sub(r"-\d{5}-of-\d{5}$", "", stem)  # a shard, as the hub names them
            if any(name.lower() in names for names in SPLITS.values()):
                found.setdefault(name, []).append(path)
    if not found:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise DataError(f"{folder} has no file named train, validation or test (.jsonl, .csv, …); it holds: {held}")
    splits: dict[str, Dataset] = {}
    for name, paths in found.items():
        if len(paths) > 1 and not all("-of-" in path.name for path in paths):
            raise DataError(
                f"{folder} has {' and '.join(path.name for path in paths)}: which is the {name} split? "
                f"Name the files one by one, or keep one"
            )
        splits[name] = _file(paths[0]) if len(paths) == 1 else _shards(paths)
    return _ordered(splits, str(folder))


def _shards(paths: list[Path]) -> Dataset:
    table = pa.concat_tables([read_table(path) for path in paths], promote_options="permissive")
    together = paths[0].with_name(re.sub(r"-\d{5}-of-", "-*-of-", paths[0].name))  # their folder is known, no line is
    return Dataset(InMemoryTable(table), info=DatasetInfo(description=f"{ORIGIN}{together}"))


def _looks_like_hub_id(source: str) -> bool:
    """Whether it is "owner/name" or "name", neither a file name by its suffix nor inside a folder that exists here."""
    if _HUB_ID.fullmatch(source) is None or data_suffix(Path(source)) in _SUFFIXES | UNSAFE:
        return False
    return not ("/" in source and Path(source).parent.is_dir())


def _hub(name: str) -> dict[str, Dataset]:
    offline = any(
        os.environ.get(key, "").lower() in ("1", "true", "yes", "on")
        for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )
    try:
        loaded = load_dataset(name)
    except Exception as error:  # whatever the hub, the network or the cache raises, the user's answer is the same
        reason = "the hub is switched off by HF_HUB_OFFLINE" if offline else str(error).splitlines()[0]
        raise DataError(
            f"there is no file or folder {name} here, and as a hub data set it cannot be had "
            f"({reason}){_neighbours(Path(name))}"
        ) from error
    if not isinstance(loaded, Mapping):
        return {"train": loaded}
    known = {split: rows for split, rows in loaded.items() if any(split in names for names in SPLITS.values())}
    return _ordered(known or loaded, name)


def _neighbours(path: Path) -> str:
    """A clause on what lies where the path points: the nearest names, or how much of the path exists."""
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder} either)" if str(folder) not in ("", ".") else ""
    return did_you_mean(path.name, (entry.name for entry in folder.iterdir()))


def _shown(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"
