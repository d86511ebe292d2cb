"""The parts of `train.cache_frozen`: keys of rows, states kept by them, and Inlay's own training settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train.test_cache import collate, features

from inlay.errors import ConfigError
from inlay.train import Run
from inlay.train.files import staged
from inlay.train.options import Options
from inlay.train.states import States, Unkeyed, row_keys


def test_keys_depend_on_what_a_row_says_and_not_on_its_batch() -> None:
    rows = features("bert")
    alone = [row_keys(collate([row]))[0][0] for row in rows]
    together, lengths = row_keys(collate(rows))
    assert together == alone
    assert lengths == [len(row["input_ids"]) for row in rows]
    assert len(set(alone)) == len(rows)
    other = [{**row, "labels": 1 - row["labels"]} for row in rows]
    assert row_keys(collate(other))[0] == alone
    shorter = [{**row, "attention_mask": [*row["attention_mask"][:-1], 0]} for row in rows]
    assert not set(row_keys(collate(shorter))[0]) & set(alone)


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ({"attention_mask": torch.tensor([[0, 1], [1, 1]])}, "padded elsewhere than on the right"),
        ({"attention_mask": torch.ones(2, 1, 2, 2)}, "not one of"),
        ({"input_ids": torch.ones(3, 2)}, "one entry a row"),
        ({"past": object()}, "more than tensors"),
    ],
)
def test_batches_whose_rows_have_no_key(inputs: dict[str, Any], why: str) -> None:
    with pytest.raises(Unkeyed, match=why):
        row_keys({"attention_mask": torch.ones(2, 2), "input_ids": torch.ones(2, 2), **inputs})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    computed = torch.randn(3, 5, 4).to(dtype)
    keys, lengths = [b"a", b"b", b"c"], [5, 2, 3]
    with staged(tmp_path / "states", marker=True) as folder:
        stored = States(10, 4, dtype, folder)
        assert stored.add(keys, lengths, computed)
        assert not stored.add([b"d"], [1], computed)
        stored.write_index(folder, "this")
    read = States.read(tmp_path / "states", "this", 4, dtype)
    assert read is not None
    for states in (stored, read):
        found = states.batch([b"c", b"a"], 6)
        assert found is not None
        assert torch.equal(found[0, :3], computed[2, :3])
        assert torch.equal(found[1, :5], computed[0])
        assert not found[0, 3:].any()
        assert states.batch([b"a", b"z"], 6) is None
        assert states.nbytes == 10 * 4 * dtype.itemsize
    assert States.read(tmp_path / "states", "other", 4, dtype) is None
    index = json.loads((tmp_path / "states" / "index.json").read_text())
    (tmp_path / "states" / "index.json").write_text(json.dumps({**index, "more": "bytes"}))
    assert States.read(tmp_path / "states", "this", 4, dtype) is None


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("cache_frozen", "memry", "train.cache_frozen must be one of auto, off, memory, disk; got 'memry'; did you"),
        ("cache_frozen_dtype", "fp8", "train.cache_frozen_dtype must be one of exact, bfloat16"),
        ("cache_frozen_budget", "2 apples", "train.cache_frozen_budget is a number of bytes"),
        ("activation_budget", 0, "train.activation_budget is a number of bytes"),
        ("chunked_loss", "yes", "train.chunked_loss must be true or false"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(setting: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Run(model="m", train={setting: value})
    assert says in str(caught.value)


def test_bytes_are_read_as_people_write_them() -> None:
    wanted = {"2GB": 2 * 10**9, "512 MiB": 2**29, "1.5g": 1.5e9, 4096: 4096, "10 kb": 10**4}
    found = {text: Options.of({"activation_budget": text}).activation_budget for text in wanted}
    assert found == wanted
