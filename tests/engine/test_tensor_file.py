"""Safetensors files: the bytes of the format's own library, whatever the types, and metadata in one order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from inlay.engine.tensor_file import DTYPES, write_tensors


def tensors() -> dict[str, Tensor]:
    """One tensor of each type, in an order that is not the file's, and the shapes that are easily forgotten."""
    torch.manual_seed(0)
    bits = torch.randint(0, 2, (2, 24), dtype=torch.uint8)
    typed = {f"of.{name}": bits.view(dtype) for dtype, name in reversed(DTYPES.items())}
    odd = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), "é": torch.ones(3), "bytes": bits[0, :5].clone()}
    return {**odd, **typed}


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}], ids=["none", "one"])
def test_the_bytes_are_the_librarys(tmp_path: Path, metadata: dict[str, str]) -> None:
    write_tensors(tmp_path / "ours", tensors(), metadata)
    save_file({name: tensor.clone() for name, tensor in tensors().items()}, tmp_path / "theirs", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    read = load_file(tmp_path / "ours")
    assert read.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape


def test_metadata_is_sorted_so_that_equal_contents_are_equal_files(tmp_path: Path) -> None:
    metadata = {key: key.upper() for key in "hgfedcba"}
    write_tensors(tmp_path / "one", tensors(), metadata)
    write_tensors(tmp_path / "two", dict(reversed(tensors().items())), dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata() == metadata
