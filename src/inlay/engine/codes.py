"""Matrices as codes of a few bits with one scale for each block of 64 entries: int8, and the NF4 of QLoRA.

    int8    w ≈ absmax · code / 127             8.5 bits an entry
    nf4     w ≈ absmax · table[code]            4.5 bits an entry, two codes a byte, the first in the high nibble

NF4's table has the quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, appendix E); codes and
scales are those of `bitsandbytes.functional.quantize_4bit` without double quantisation, which is not needed here. What
was decoded is coded again to the same codes, so that a file may be read and written any number of times.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.errors import CheckpointError, ConfigError, UnsupportedError, did_you_mean

KINDS = ("int8", "nf4")
BLOCK = 64
ENTRY = "inlay_codes"
"""In a safetensors file's metadata: which tensors are codes, and of what."""
SCALES = ".absmax"
"""What the scales are called after the tensor's own name."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclasses.dataclass(frozen=True)
class Report:
    """What quantising an adapter did."""

    kind: str
    tensors: int
    relative_error: float
    """‖W − Ŵ‖ / ‖W‖ over all of them."""
    largest_error: float
    """The same for the worst of them."""
    bytes: int
    """Of codes and scales."""
    plain_bytes: int
    """Of the same tensors as they were."""


def check_kind(kind: str) -> str:
    """The kind itself; ConfigError for one that there is not."""
    if kind not in KINDS:
        raise ConfigError(f"quantise={kind!r}: choose one of {', '.join(KINDS)}{did_you_mean(str(kind), KINDS)}")
    return kind


def encode(tensor: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes (int8 in the tensor's shape, or uint8 with two in each) and the scales of the blocks, float32."""
    flat = tensor.detach().float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    unit = blocks / absmax.masked_fill(absmax == 0, 1)[:, None]
    if kind == "int8":
        codes = (unit * 127).round().to(torch.int8).view(-1)[: flat.numel()]
        return codes.view(tensor.shape), absmax
    table = torch.tensor(NF4, device=tensor.device)
    nearest = torch.bucketize(unit, (table[1:] + table[:-1]) / 2).to(torch.uint8).view(-1)
    nearest = nearest[: flat.numel() + flat.numel() % 2]
    return nearest[0::2] << 4 | nearest[1::2], absmax


def decode(codes: Tensor, absmax: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """The values, in float32."""
    size = torch.Size(shape).numel()
    if kind == "int8":
        unit = codes.reshape(-1).float() / 127
    else:
        pairs = codes.reshape(-1).long()
        unit = torch.tensor(NF4, device=codes.device)[torch.stack([pairs >> 4, pairs & 15], 1).view(-1)[:size]]
    return (unit * absmax.repeat_interleave(BLOCK)[:size]).view(shape)


def rounded(tensor: Tensor, kind: str) -> Tensor:
    """The nearest that such codes can say, in the tensor's dtype."""
    codes, absmax = encode(tensor, kind)
    return decode(codes, absmax, kind, tuple(tensor.shape)).to(tensor.dtype)


# -- in a file ---------------------------------------------------------------------------------------------------------


def matrices(tensors: Mapping[str, Tensor], whole: Sequence[int], pieces: Iterable[object]) -> list[str]:
    """The names of the tensors to quantise: matrices, but for heads and modules trained whole (`whole` methods).

    Raises UnsupportedError where there are none, or where two of them are to cancel, which codes of few bits do not.
    """
    if any(isinstance(getattr(piece, "start", None), tuple) for piece in pieces):
        raise UnsupportedError(
            "this adapter subtracts the factors that it started from (init='pissa' or 'olora'), and rounding both "
            "leaves more error than change: save it plain, or quantise the plain LoRA that inlay.to_lora makes of it"
        )
    kept = {str(number) for number in whole}
    values = {key: value for key, value in tensors.items() if value.is_floating_point() and value.dim() > 1}
    found = [key for key in values if key.partition(".")[0] not in kept]
    if not found:
        raise UnsupportedError("this adapter has no matrices to quantise: save it plain")
    return found


def coded(
    tensors: Mapping[str, Tensor], kind: str, names: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, str], Report]:
    """A file's tensors with some as codes, what its metadata has to say of them, and the error."""
    made, entries = dict(tensors), {}
    lost = norm = 0.0
    largest, size, plain = 0.0, 0, 0
    for name in names:
        tensor = tensors[name]
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} has values that are not finite: there is no scale for them, train it again")
        codes, absmax = encode(tensor, kind)
        made[name], made[name + SCALES] = codes.contiguous(), absmax
        entries[name] = {"codes": kind, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        values = tensor.detach().double()
        error = (values - rounded(tensor, kind).double()).square().sum().item()
        square = values.square().sum().item()
        lost, norm, largest = lost + error, norm + square, max(largest, error / square if square else 0.0)
        size, plain = size + codes.nbytes + absmax.nbytes, plain + tensor.nbytes
    relative = (lost / norm) ** 0.5 if norm else 0.0
    report = Report(kind, len(entries), relative, largest**0.5, size, plain)
    return made, {ENTRY: json.dumps(entries, sort_keys=True)}, report


def plain(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    """A file's tensors with those that are codes decoded. Raises CheckpointError where they do not fit together."""
    if ENTRY not in metadata:
        return dict(tensors)
    made = dict(tensors)
    try:
        for name, entry in json.loads(metadata[ENTRY]).items():
            made[name] = _decoded(made[name], made.pop(name + SCALES), entry)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its quantised tensors do not fit together ({type(error).__name__}: {error}): save it again"
        ) from error
    return made


def _decoded(codes: Tensor, absmax: Tensor, entry: Mapping[str, Any]) -> Tensor:
    kind, shape = entry["codes"], tuple(int(size) for size in entry["shape"])
    size = torch.Size(shape).numel()
    wanted = {"int8": (torch.int8, size), "nf4": (torch.uint8, -(-size // 2))}[kind]
    if (codes.dtype, codes.numel()) != wanted or absmax.dtype != torch.float32 or absmax.numel() != -(-size // BLOCK):
        raise ValueError(f"{codes.numel()} codes and {absmax.numel()} scales for a tensor of {shape}")
    return decode(codes, absmax, kind, shape).to(_DTYPES[entry["dtype"]])
