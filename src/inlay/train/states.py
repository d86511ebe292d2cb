"""Hidden states kept by what they were computed from: rows of (length, width), end to end in one flat tensor.

A row's key is a hash of everything the model is given for it but labels, without the padding, so a state is found only
by the very input that it belongs to, in whatever batch and order the input comes back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.train.files import is_complete

ANSWERS = frozenset({"labels", "label", "label_ids", "start_positions", "end_positions"})
"""Inputs that a loss is computed from, and hidden states are not."""
VALUES, INDEX = "states.bin", "index.json"


class Unkeyed(Exception):
    """Why the rows of a batch cannot be told apart. Its text is the end of a sentence."""


def row_keys(inputs: Mapping[str, Any]) -> tuple[list[bytes], list[int] | None]:
    """(a key for each row of the batch, its length in tokens); no lengths where there is no attention mask."""
    given = {name: value for name, value in inputs.items() if name not in ANSWERS and value is not None}
    if not given or not all(isinstance(value, Tensor) and value.dim() for value in given.values()):
        raise Unkeyed("the model is given more than tensors")
    tensors = {name: value.detach().cpu() for name, value in sorted(given.items())}
    count = next(iter(tensors.values())).shape[0]
    if any(tensor.shape[0] != count for tensor in tensors.values()):
        raise Unkeyed("not everything that the model is given has one entry a row")
    mask = tensors.get("attention_mask")
    lengths = None if mask is None else _lengths(mask)
    digests = [hashlib.blake2b(digest_size=16) for _ in range(count)]
    for name, tensor in tensors.items():
        long = lengths is not None and mask is not None and tensor.shape[1:2] == mask.shape[1:]
        raw = tensor.contiguous().reshape(count, -1).view(torch.uint8).numpy()
        width = raw.shape[1] // tensor.shape[1] if long else 0
        head = f"{name} {tensor.dtype} {tuple(tensor.shape[2 if long else 1 :])} ".encode()
        for row, digest in enumerate(digests):
            cell = (raw[row, : width * lengths[row]] if long and lengths else raw[row]).tobytes()
            digest.update(head + len(cell).to_bytes(8, "big") + cell)
    keys = [digest.digest() for digest in digests]
    return keys, lengths


def _lengths(mask: Tensor) -> list[int]:
    if mask.dim() != 2:
        raise Unkeyed("the attention mask is not one of (rows, tokens)")
    lengths = mask.bool().sum(1)
    if not torch.equal(mask.bool(), torch.arange(mask.shape[1]) < lengths[:, None]):
        raise Unkeyed("rows are padded elsewhere than on the right, which moves their positions from batch to batch")
    return [int(length) for length in lengths]


class States:
    """Room for `count` hidden states of `width` features, in memory or, with `folder`, in a mapped file."""

    def __init__(self, count: int, width: int, dtype: torch.dtype, folder: Path | None = None) -> None:
        self.width, self.dtype = width, dtype
        self.flat = _mapped(folder, count, width, dtype) if folder else torch.empty(count, width, dtype=dtype)
        self.places: dict[bytes, tuple[int, int]] = {}
        self.used = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the states kept so far."""
        return self.used * self.width * self.dtype.itemsize

    def add(self, keys: Sequence[bytes], lengths: Sequence[int] | None, states: Tensor) -> bool:
        """Keep the rows of one batch, (rows, tokens, width); those that are there already stay. False: no room."""
        for row, key in enumerate(keys):
            length = states.shape[1] if lengths is None else lengths[row]
            if key not in self.places:
                if self.used + length > self.flat.shape[0]:
                    return False
                self.flat[self.used : self.used + length] = states[row, :length]
                self.places[key] = (self.used, length)
                self.used += length
        return True

    def batch(self, keys: Iterable[bytes], tokens: int | None) -> Tensor | None:
        """The rows of a batch, filled up with zeros to `tokens` (None: all are as long); None when one is missing."""
        places = [self.places.get(key) for key in keys]
        found = [place for place in places if place is not None]
        if len(found) < len(places):
            return None
        tokens = found[0][1] if tokens is None else tokens
        batch = self.flat.new_zeros(len(found), tokens, self.width)
        for row, (start, length) in enumerate(found):
            batch[row, :length] = self.flat[start : start + length]
        return batch

    # -- on disk -----------------------------------------------------------------------------------------------------

    def write_index(self, folder: Path, identity: str) -> None:
        """Write down what lies where, beside the values."""
        places = {key.hex(): place for key, place in self.places.items()}
        index = {"identity": identity, "count": self.flat.shape[0], "used": self.used, "places": places}
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, identity: str, width: int, dtype: torch.dtype) -> States | None:
        """The states in a folder, if they are complete and have this identity."""
        if not is_complete(folder):
            return None
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["identity"] != identity:
            return None
        states = cls(index["count"], width, dtype, folder)
        states.places = {bytes.fromhex(key): (start, length) for key, (start, length) in index["places"].items()}
        states.used = index["used"]
        return states


def _mapped(folder: Path, count: int, width: int, dtype: torch.dtype) -> Tensor:
    path = str(folder / VALUES)
    return torch.from_file(path, shared=True, size=max(1, count * width), dtype=dtype)[: count * width].view(-1, width)
