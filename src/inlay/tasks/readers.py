"""Files to rows: JSON Lines, JSON, CSV, TSV, Parquet and plain text, and any of them gzipped.

Text formats are read by line, so that every error can name the file and the line. Cells of CSV and TSV stay strings
("007" and "NA" are kept as they are); tasks turn them into numbers where they mean numbers.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from inlay.errors import DataError, did_you_mean

Row = dict[str, Any]

UNSAFE = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz"}
"""Formats that hold, or may hold, pickled objects."""

CHUNK = 10_000
"""Rows turned into Arrow at a time, so that a large file is never a large list of Python objects."""


def data_suffix(path: Path) -> str:
    """The suffix that says the format, without a trailing .gz: "train.jsonl.gz" has ".jsonl"."""
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def read_table(path: Path) -> pa.Table:
    """The rows of one file as an Arrow table. Raises DataError naming the file and, in text formats, the line."""
    suffix = data_suffix(path)
    if suffix in UNSAFE:
        raise DataError(
            f"{path} is a {suffix} file, which may hold a pickle, and reading a pickle runs code: "
            f"it is refused. Save the rows as .jsonl, .csv or .parquet"
        )
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix not in LINE_READERS:
        known = sorted([*LINE_READERS, ".parquet"])
        raise DataError(
            f"{path} has a name that tells no format I know{did_you_mean(suffix, known)}; "
            f"formats: {', '.join(known)}, and any of these with .gz"
        )
    return _to_arrow(path, numbered_rows(path))


def numbered_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line, row) for every row of a file in a text format; lines count from 1."""
    return LINE_READERS[data_suffix(path)](path)


def line_of(path: Path, index: int) -> int | None:
    """The line on which row `index` of a file begins, or None where the format has no lines."""
    if data_suffix(path) not in LINE_READERS:
        return None
    for count, (line, _) in enumerate(numbered_rows(path)):
        if count == index:
            return line
    return None


# -- bytes and lines --------------------------------------------------------------------------------------------------


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text with its line end) of a UTF-8 file; a byte order mark is dropped."""
    try:
        with _open(path) as stream:
            for number, raw in enumerate(stream, start=1):
                yield number, _decode(path, number, raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}): fetch or write it again") from error


def _decode(path: Path, number: int, raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} line {number} is not UTF-8 (byte 0x{raw[error.start]:02x} at column "
            f"{error.start + 1}): save the file as UTF-8"
        ) from error
    return text.removeprefix("\ufeff") if number == 1 else text


# -- one reader a format ----------------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    for number, text in _lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            cut = "" if text.endswith("\n") else ": the file seems cut in the middle of this line"
            shown = text.strip()
            raise DataError(
                f"{path} line {number} is not JSON ({error}){cut}; it reads "
                f"{shown[:60] + '…' if len(shown) > 60 else shown!r}"
            ) from error
        yield number, _object(path, number, row)


def _json(path: Path) -> Iterator[tuple[int, Row]]:
    """A list of objects; a .json file that holds one object a line is read as JSON Lines."""
    text = "".join(line for _, line in _lines(path))
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "{":
        yield from _json_lines(path)
        return
    try:
        json.loads(text or "[]")
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path} line {line} is not JSON ({error}): is the file cut?") from error
    if text[start : start + 1] not in ("[", ""):
        raise DataError(f"{path} holds a single JSON value; a list of objects is needed")
    yield from _json_items(path, text, start + 1)


def _json_items(path: Path, text: str, at: int) -> Iterator[tuple[int, Row]]:
    """The items of a JSON list that is known to be well formed, each with its line."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at >= len(text) or text[at] == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        item, at = decoder.raw_decode(text, at)
        yield line, _object(path, line, item)


def _object(path: Path, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"{path} line {number} holds a JSON {type(row).__name__}; each row must be an object "
            f'such as {{"text": "…", "label": "…"}}'
        )
    return row


def _csv(path: Path) -> Iterator[tuple[int, Row]]:
    """RFC 4180; where the header has more semicolons or tabs than commas, those separate."""
    header = next((text for _, text in _lines(path)), "")
    delimiter = max(",;\t", key=header.count)
    return _delimited(path, delimiter, quoted=True)


def _tsv(path: Path) -> Iterator[tuple[int, Row]]:
    """GLUE writes quotes in TSV as plain characters, spreadsheets as CSV does: the first reading that fits is taken."""
    try:
        rows = list(_delimited(path, "\t", quoted=False))
    except DataError as plain:
        try:
            rows = list(_delimited(path, "\t", quoted=True))
        except DataError:
            raise plain from None
    return iter([(line, {name: _undouble(cell) for name, cell in row.items()}) for line, row in rows])


def _undouble(cell: str) -> str:
    """Undo CSV quoting in a cell that can only be the result of it (doubled quotes inside of quotes)."""
    inside = cell[1:-1]
    quoted = len(cell) > 2 and cell[0] == cell[-1] == '"' and '""' in inside and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if quoted else cell


def _delimited(path: Path, delimiter: str, *, quoted: bool) -> Iterator[tuple[int, Row]]:
    lines = (text for _, text in _lines(path))
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    try:
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=quoted)
        header: list[str] | None = None
        begins = 1
        for cells in reader:
            line, begins = begins, reader.line_num + 1
            if not cells:  # an empty line
                continue
            if header is None:
                header = _header(path, line, cells)
            elif len(cells) != len(header):
                raise DataError(
                    f"{path} line {line} has {len(cells)} cells where the header has {len(header)} "
                    f"({', '.join(header)}): quote cells that hold {delimiter!r}, quotes or line ends"
                )
            else:
                yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path} line {begins} cannot be read as delimited text ({error}): is a quote left open, or the file cut?"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _header(path: Path, line: int, cells: list[str]) -> list[str]:
    names = [cell.strip() or "index" for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path} line {line}: the header names column {twice!r} twice; give each column its own name")
    return names


def _text(path: Path) -> Iterator[tuple[int, Row]]:
    """One row a line, in the column "text"; empty lines are skipped."""
    return ((number, {"text": text.rstrip("\r\n")}) for number, text in _lines(path) if text.strip())


LINE_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _json_lines,
    ".jsonlines": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _text,
    ".text": _text,
}


def _read_parquet(path: Path) -> pa.Table:
    try:
        with _open(path) as stream:
            return pq.read_table(pa.BufferReader(stream.read()) if path.suffix.lower() == ".gz" else path)
    except (pa.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole Parquet file ({str(error).splitlines()[0]})") from error


# -- rows to Arrow ----------------------------------------------------------------------------------------------------


def _to_arrow(path: Path, rows: Iterable[tuple[int, Row]]) -> pa.Table:
    tables: list[pa.Table] = []
    chunk: list[tuple[int, Row]] = []
    for pair in rows:
        chunk.append(pair)
        if len(chunk) == CHUNK:
            tables.append(_chunk_table(path, chunk))
            chunk = []
    if chunk:
        tables.append(_chunk_table(path, chunk))
    if not tables:
        raise DataError(f"{path} has no rows: the file is {'empty' if path.stat().st_size == 0 else 'without data'}")
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{path}: a column changes its type on the way ({str(error).splitlines()[0]})") from error


def _chunk_table(path: Path, chunk: list[tuple[int, Row]]) -> pa.Table:
    names = list(dict.fromkeys(name for _, row in chunk for name in row))
    try:
        return pa.table({name: pa.array([row.get(name) for _, row in chunk]) for name in names})
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError, OverflowError) as error:
        raise _misfit(path, names, chunk, error) from error


def _misfit(path: Path, names: list[str], chunk: list[tuple[int, Row]], error: Exception) -> DataError:
    """The error for a column whose values do not fit together, naming the first line that does not fit."""
    for name in names:
        kinds: dict[str, int] = {}
        for line, row in chunk:
            value = row.get(name)
            try:
                pa.array([value])
            except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError, OverflowError) as reason:
                return DataError(f"{path} line {line}: column {name!r} holds a value that cannot be used ({reason})")
            if value is not None:
                kinds.setdefault(type(value).__name__, line)
        if len(kinds) > 1 and set(kinds) != {"int", "float"}:
            (first, _), (second, line) = list(kinds.items())[:2]
            return DataError(
                f"{path} line {line}: column {name!r} holds a {second} where earlier rows hold a {first}: "
                f"give the column one type"
            )
    return DataError(f"{path}: rows do not fit into one table ({str(error).splitlines()[0]})")
