"""Writing a safetensors file: the length of a JSON header (8 bytes), the header, then the tensors' bytes end to end.

The format is that of https://github.com/huggingface/safetensors (README, "Format"), and the bytes are those that its
library writes, but for one thing: the library orders several entries of metadata at random, so that equal adapters
would give unequal files. Reading is left to the library, which is careful with files that cannot be trusted.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""What the format calls each type. Tensors come in this order, wide types first: each then lies where its size asks."""
RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES)}


def owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, unshared copies where needed: the file format has no aliases."""
    seen: set[int] = set()
    owned: dict[str, Tensor] = {}
    for key, value in tensors.items():
        tensor = value.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        owned[key] = tensor.clone() if pointer in seen or tensor.storage_offset() else tensor
        seen.add(pointer)
    return owned


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors that share no memory; the metadata comes sorted."""
    named = sorted(tensors.items(), key=lambda item: (RANKS[item[1].dtype], item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, tensor in named:
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for _, tensor in named:
            file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
