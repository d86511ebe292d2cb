"""Sources of rows: files, folders, mappings, datasets, and names that are none of these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from inlay.errors import DataError
from inlay.tasks import data
from inlay.tasks.data import read_rows, read_splits

Write = Callable[..., Path]
ROW = [{"text": "a", "label": "x"}]


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev", "eval", "DEV"])
def test_a_folder_gives_its_splits_under_any_of_their_names(write: Write, tmp_path: Path, validation: str) -> None:
    write("test.tsv", "text\tlabel\na\tx\n")
    write(f"{validation}.jsonl", ROW)
    write("train.csv", "text,label\na,x\n")
    write("README.md", "not data")
    splits = read_splits(tmp_path)
    assert list(splits) == ["train", "validation", "test"]
    assert read_rows(str(tmp_path), split=validation).to_list() == ROW


def test_a_file_is_train_and_shards_are_one_split(write: Write, tmp_path: Path) -> None:
    path = write("train-00000-of-00002.jsonl", ROW)
    write("train-00001-of-00002.jsonl", ROW)
    assert list(read_splits(path)) == ["train"]
    assert len(read_splits(tmp_path)["train"]) == 2


def test_mappings_and_datasets(write: Write) -> None:
    path = write("some.jsonl", ROW)
    splits = read_splits({"train": str(path), "dev": Dataset.from_list(ROW)})
    assert list(splits) == ["train", "validation"]
    assert list(read_splits(DatasetDict(train=Dataset.from_list(ROW)))) == ["train"]
    rows = Dataset.from_list(ROW)
    assert read_rows(rows) is rows
    assert read_rows(rows, split="test") is rows


def test_a_folder_written_by_datasets(tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_list(ROW), test=Dataset.from_list(ROW * 2)).save_to_disk(tmp_path / "saved")
    assert {name: len(rows) for name, rows in read_splits(tmp_path / "saved").items()} == {"train": 1, "test": 2}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("trian.jsonl", "no such file or folder; did you mean 'train.jsonl'"),
        ("no/such/train.jsonl", "there is no folder .*no/such either"),
        ({"train": "train.jsonl", "tset": "train.jsonl"}, "'tset' is not the name of a split; did you mean 'test'"),
        ({"dev": "train.jsonl", "validation": "train.jsonl"}, "gives the validation split twice"),
        ({}, "gives no split"),
    ],
)
def test_what_is_not_there(write: Write, monkeypatch: pytest.MonkeyPatch, source: Any, message: str) -> None:
    monkeypatch.chdir(write("train.jsonl", ROW).parent)
    with pytest.raises(DataError, match=message):
        read_splits(source)


def test_folders_that_leave_a_doubt(write: Write, tmp_path: Path) -> None:
    write("one/notes.md", "")
    with pytest.raises(DataError, match=r"no file named train, validation or test .* it holds: notes.md"):
        read_splits(tmp_path / "one")
    write("two/train.csv", "text\na\n")
    write("two/train.jsonl", ROW)
    with pytest.raises(DataError, match=r"train.csv and train.jsonl: which is the train split"):
        read_splits(tmp_path / "two")
    write("three/train.jsonl", ROW)
    write("three/test.jsonl", ROW)
    with pytest.raises(DataError, match="several splits"):
        read_rows(tmp_path / "three")
    with pytest.raises(DataError, match="has no split 'dev'"):
        read_rows(tmp_path / "three", split="dev")


@pytest.mark.parametrize("name", ["./data", "data/x/y", "/data", "my data", "train.jsonl", "rows.pkl", "~/rows"])
def test_only_what_looks_like_a_hub_id_asks_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(name: str) -> None:
        raise AssertionError(f"asked the hub for {name}")

    monkeypatch.setattr(data, "load_dataset", asked)
    with pytest.raises(DataError, match="no such file or folder"):
        read_splits(name)


@pytest.mark.parametrize("name", ["sst2", "stanfordnlp/sst2"])
def test_a_hub_id_asks_the_hub_and_says_what_became_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load_dataset", lambda name: DatasetDict(train=Dataset.from_list(ROW)))
    assert len(read_splits(name)["train"]) == 1

    def offline(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(data, "load_dataset", offline)
    with pytest.raises(DataError, match=rf"there is no file or folder {name} here, and as a hub data set"):
        read_splits(name)


def test_published_files_as_they_are(shared_data: Path) -> None:
    splits = read_splits(shared_data / "text_classification" / "sst2_glue_tsv")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6920, "validation": 872, "test": 1821}
    plain = read_splits(shared_data / "text_classification" / "sst2")
    assert splits["train"]["sentence"][:] == plain["train"]["text"][:]
    assert splits["test"].column_names == ["index", "sentence"]
