"""Every format gives the same rows, and every broken file an error that names the file and the line."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inlay.errors import DataError
from inlay.tasks.data import place, read_rows

ROWS = [{"text": 'He said "no",\tthen left', "label": "a"}, {"text": "naïve – 東京", "label": "b"}]
Write = Callable[..., Path]


def csv_text(delimiter: str) -> str:
    quoted = [f'"{row["text"].replace(chr(34), chr(34) * 2)}"{delimiter}{row["label"]}' for row in ROWS]
    return "\n".join([f"text{delimiter}label", *quoted]) + "\n"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_all_formats_hold_the_same_rows(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        content = {
            "jsonl": "\n".join(json.dumps(row) for row in ROWS),
            "json": json.dumps(ROWS, indent=2, ensure_ascii=False),
            "csv": csv_text(","),
            "tsv": csv_text("\t"),
        }[suffix]
        path.write_text(content, encoding="utf-8")
    if zipped:
        path = tmp_path / f"rows.{suffix}.gz"
        path.write_bytes(gzip.compress((tmp_path / f"rows.{suffix}").read_bytes()))
    assert read_rows(path).to_list() == ROWS


def test_text_is_one_row_a_line_without_the_empty_ones(write: Write) -> None:
    rows = read_rows(write("book.txt", "one\r\n\r\n two \nthree"))
    assert rows["text"][:] == ["one", " two ", "three"]
    assert place(rows, 1).endswith("book.txt line 3")


def test_tsv_quotes_are_characters_as_in_glue_unless_a_spreadsheet_wrote_them(write: Write) -> None:
    plain = read_rows(write("a.tsv", 'sentence\tlabel\n"so-called" film\t1\n" lone quote\t0\n"whole"\t1\n'))
    assert plain["sentence"][:] == ['"so-called" film', '" lone quote', '"whole"']
    doubled = read_rows(write("b.tsv", 'sentence\tlabel\n"He said ""no"""\t1\n'))
    assert doubled["sentence"][:] == ['He said "no"']
    spread = read_rows(write("c.tsv", 'sentence\tlabel\n"two\nlines"\t1\n'))
    assert spread["sentence"][:] == ["two\nlines"]


def test_csv_finds_its_delimiter_and_keeps_strings(write: Write) -> None:
    rows = read_rows(write("a.csv", "\ufefftext;label\nan, example;007\nNA;1.0\n"))
    assert rows.to_list() == [{"text": "an, example", "label": "007"}, {"text": "NA", "label": "1.0"}]


def test_csv_without_a_name_for_its_first_column_is_a_pandas_index(write: Write) -> None:
    assert read_rows(write("a.csv", ",text\n0,x\n")).column_names == ["index", "text"]


def test_long_cells_are_no_error(write: Write) -> None:
    assert len(read_rows(write("a.csv", "text,label\n" + "x" * 200_000 + ",1\n"))["text"][0]) == 200_000


def test_json_rows_know_their_lines(write: Write) -> None:
    path = write("a.json", '[\n {"text": "a"},\n\n {"text":\n  "b"}\n]')
    assert place(read_rows(path), 1) == f"{path} line 4"
    assert read_rows(write("b.json", '{"text": "a"}\n{"text": "b"}\n'))["text"][:] == ["a", "b"]


def test_place_survives_selecting_and_shuffling(write: Write) -> None:
    rows = read_rows(write("a.jsonl", "".join(f'{{"text": "{index}"}}\n\n' for index in range(9))))
    shuffled = rows.shuffle(seed=1)
    for index, text in enumerate(shuffled["text"][:]):
        assert place(shuffled, index).endswith(f"line {2 * int(text) + 1}")


def test_many_rows_go_through_in_chunks(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inlay.tasks.readers.CHUNK", 3)
    rows = read_rows(write("a.jsonl", [{"x": None}] * 4 + [{"x": 1.5, "y": "late"}] * 4))
    assert rows["x"][:] == [None] * 4 + [1.5] * 4
    assert rows["y"][:] == [None] * 4 + ["late"] * 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "has no rows: the file is empty"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.txt", "", "has no rows"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b', "line 2 is not JSON .* cut in the middle of this line"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "line 2 holds a JSON list; each row must be an object"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": 1}\n', "line 3: column 'text' holds a int where earlier rows hold"),
        ("a.jsonl", '{"t": ["a", 1]}\n', "line 1: column 't' holds a value that cannot be used"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "line 1: column 'text' holds a value that cannot be used"),
        ("a.json", '[{"text": "a"},\n{"text": ', "line 2 is not JSON .*cut"),
        ("a.json", "3", "a list of objects is needed"),
        ("a.csv", "text,label\na,1\nb\n", r"line 3 has 1 cells where the header has 2 \(text, label\)"),
        ("a.csv", 'text,label\na,1\n"b,0\n', "line 3 cannot be read .* quote left open"),
        ("a.csv", "text,text\na,1\n", "names column 'text' twice"),
        ("a.tsv", "sentence\tlabel\nx\t1\ny\t1\textra\n", "line 3 has 3 cells"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8 .*0xe9"),
        ("a.csv", "text,label\ncafé,1\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20], "not a whole gzip file"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "not a whole gzip file"),
        ("a.parquet", b"PAR1 and then nothing", "not a whole Parquet file"),
        ("a.pkl", pickle.dumps([1]), "may hold a pickle.* refused"),
        ("a.pt.gz", b"", "refused"),
        ("a.xlsx", b"PK", "tells no format I know"),
        ("a.jsnl", "{}", "did you mean '.jsonl'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(write: Write, name: str, content: str | bytes, message: str) -> None:
    path = write(name, content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
