"""What every launch shares: tuned block sizes, checks of the operands, and counts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from inlay.errors import ConfigError
from inlay.kernels.triton import MAX_RANK

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on CPU tensors: for tests, not for use."""
INTERPRETED_PROCESSORS = 4


def tuned(
    configs: Sequence[Any], key: Sequence[str], small: Mapping[str, int], restore: Sequence[str] = ()
) -> Callable[[Any], Any]:
    """Decorator that picks the fastest of `configs` for each value of the arguments named in `key`.

    Only on a device: in the interpreter the blocks are `small`, so that small tensors have several. `restore` names the
    arguments that the kernel changes in place, which have to be as before when it is timed again.
    """
    if INTERPRETED:
        configs = [triton.Config(dict(small))]
    return triton.autotune(configs=list(configs), key=list(key), restore_value=list(restore))  # type: ignore[no-any-return]


def row_class(rows: int) -> int:
    """0, 1 or 2 for few, some and many rows: the tuner chooses once for each, not for every batch."""
    return (rows > 256) + (rows > 4096)


def padded(rank: int) -> int:
    """The rank as the tensor cores take it: a power of two, 16 at least."""
    return max(16, int(triton.next_power_of_2(rank)))


def precision() -> str:
    """How products of float32 are taken: as torch takes its own."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device: how many programs run at once, at least."""
    if not tensor.is_cuda:
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)


def run(length: int, block: int, wanted: int) -> int:
    """The length of equal runs, a multiple of `block`, of which there are about `wanted` in the whole length."""
    blocks = -(-length // block)
    return -(-blocks // max(1, min(blocks, wanted))) * block


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; make that the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_matrix(name: str, tensor: Tensor, rows: int | None, columns: int | None, *, like: Tensor) -> None:
    """Raise ConfigError unless it is a (rows, columns) matrix of a kind the kernels take, on the device of `like`."""
    shape = tuple(tensor.shape)
    expected = tuple(size if given is None else given for size, given in zip(shape, (rows, columns), strict=False))
    if len(shape) != 2 or shape != expected:
        wanted = ", ".join("any" if size is None else str(size) for size in (rows, columns))
        raise ConfigError(f"{name} has the shape {shape}; give one of ({wanted})")
    if tensor.dtype not in MAX_RANK:
        raise ConfigError(f"{name} is {tensor.dtype}; the Triton kernels take float16, bfloat16 and float32")
    check_device(name, tensor, like=like)


def check_rows(name: str, tensor: Tensor, rows: int | None, columns: int | None, *, like: Tensor) -> None:
    """The same for activations, each row of which has to lie in one piece, in the dtype of `like`."""
    check_matrix(name, tensor, rows, columns, like=like)
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise ConfigError(f"{name} has strides {tensor.stride()}; its rows must lie in one piece: call .contiguous()")
    if tensor.dtype != like.dtype:
        raise ConfigError(f"{name} is {tensor.dtype} and the rest {like.dtype}; cast one of them")


def check_device(name: str, tensor: Tensor, *, like: Tensor) -> None:
    """Raise ConfigError unless both are on one device."""
    if tensor.device != like.device:
        raise ConfigError(f"{name} is on {tensor.device} and the rest on {like.device}; move one of them")


def check_rank(rank: int, *, like: Tensor) -> None:
    """Raise ConfigError for a rank whose block does not fit in registers."""
    most = MAX_RANK[like.dtype]
    if rank > most:
        raise ConfigError(
            f"rank {rank} is above {most}, the most that Triton's kernels take in {like.dtype}; use the plain products"
        )


def check_vector(name: str, tensor: Tensor, length: int, *, like: Tensor) -> None:
    """Raise ConfigError unless it is a contiguous float32 vector of this length on the device of `like`."""
    if tensor.shape != (length,) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ConfigError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; give {length} contiguous float32 numbers"
        )
    check_device(name, tensor, like=like)
