"""The Triton kernels of `gpu.py`: what each is compared with and the bytes that it has to move.

T = 8,192 tokens, 4,096 wide, r = 16, bf16 with float32 masters, as in a step of the Llama there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, WIDTH, RANK, SCALE, P, SEED = 8192, 4096, 16, 0.3, 0.1, 2**40 + 7
DEVICE = "cuda"
BF16, FP32 = torch.bfloat16, torch.float32

Product = Callable[[Tensor], Any]
"""A product that gets the tensor it may change; what it returns is compared."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel, what it has to equal, what one would write in torch, and the bytes that it has to move."""

    fused: Product
    reference: Product
    usual: Product
    bytes: int
    target: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    """What is changed in place, where anything is."""

    def difference(self) -> float:
        """The largest relative difference between the kernel and its reference."""
        return difference(self.fused(self.target.clone()), self.reference(self.target.clone()))


def cases() -> dict[str, Callable[[], dict[str, Case]]]:
    """Makers of cases, so that the operands of one group are gone before the next."""
    return {
        "products": product_cases, "dropout": dropout_cases, "norm": norm_cases,
        "quantised": quantised_cases, "grouped": grouped_cases,
    }  # fmt: skip


def product_cases() -> dict[str, Case]:
    """The epilogue and the two gradients."""
    from inlay.kernels.triton import epilogue, gradients

    y, h, b = normal(TOKENS, WIDTH), normal(TOKENS, RANK), normal(WIDTH, RANK, dtype=FP32)
    return {
        "epilogue": Case(
            lambda out: epilogue.add_product_(out, h, b, SCALE),
            lambda out: epilogue.reference(out, h, b, SCALE),
            lambda out: out.addmm_(h, b.to(BF16).T, alpha=SCALE),
            2 * size(y),
            y,
        ),
        "gradients": Case(
            lambda _: gradients.product_gradients(y, h, b, SCALE),
            lambda _: gradients.reference(y, h, b, SCALE),
            lambda _: ((y @ b.to(BF16)).mul_(SCALE), (h.T @ y).T.mul(SCALE).float()),
            size(y),
        ),
    }


def dropout_cases() -> dict[str, Case]:
    """Dropout in the product, and in its gradients."""
    from inlay.kernels.triton import dropout

    x, dx, dh, a = normal(TOKENS, WIDTH), normal(TOKENS, WIDTH), normal(TOKENS, RANK), normal(RANK, WIDTH, dtype=FP32)
    mask = torch.rand(TOKENS, WIDTH, device=DEVICE) > P
    return {
        "dropped product": Case(
            lambda _: dropout.dropped_product(x, a, P, SEED),
            lambda _: dropout.reference_product(x, a, P, SEED),
            lambda _: F.dropout(x, P) @ a.to(BF16).T,
            size(x),
        ),
        "dropped gradients": Case(
            lambda out: (out, dropout.dropped_gradients_(out, x, dh, a, P, SEED)),
            lambda out: dropout.reference_gradients(out, x, dh, a, P, SEED),
            lambda out: (out.add_((dh @ a.to(BF16)) * mask), (dh.T @ (x * mask)).float()),
            3 * size(x),
            dx,
        ),
    }


def norm_cases() -> dict[str, Case]:
    """The norm of DoRA."""
    from inlay.kernels.triton import dora_norm

    w, a, b = normal(WIDTH, WIDTH), normal(RANK, WIDTH, dtype=FP32), normal(WIDTH, RANK, dtype=FP32)

    def reference(_: Tensor) -> Tensor:
        return dora_norm.reference(w, a, b, SCALE)

    return {"DoRA norm": Case(lambda _: dora_norm.row_norms(w, a, b, SCALE), reference, reference, size(w))}


def quantised_cases() -> dict[str, Case]:
    """4-bit weights against bitsandbytes; none where that is not installed."""
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        return {}
    from inlay.kernels.triton import nf4

    codes, state = functional.quantize_4bit(
        normal(WIDTH, WIDTH), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    weight = nf4.Quantised.from_bitsandbytes(codes, state)
    stored = size(codes) + size(weight.absmax)

    def decoded(_: Tensor) -> Tensor:
        return functional.dequantize_4bit(codes, state)

    def product(x: Tensor) -> Tensor:
        return x @ decoded(x).T

    found = {
        "NF4 decoding": Case(lambda _: nf4.decode(weight, BF16), decoded, decoded, stored + 2 * math.prod(weight.shape))
    }
    for rows in (1, 16, nf4.MOST_ROWS):
        x = normal(rows, WIDTH)
        found[f"NF4 product, {rows} rows"] = Case(lambda x: nf4.linear(x, weight), product, product, stored, x)
    return found


def grouped_cases() -> dict[str, Case]:
    """Mixed batches: 32 rows with 32 adapters, and 32 sequences of 256 with 8."""
    return {f"grouped, 32 × {length}, {n} adapters": grouped_case(n, length) for n, length in ((32, 1), (8, 256))}


def grouped_case(adapters: int, length: int) -> Case:
    """32 sequences whose adapters take turns, against gathered factors and batched products."""
    from inlay.kernels.triton import grouped

    a, b = normal(adapters, RANK, WIDTH), normal(adapters, WIDTH, RANK)
    scales = torch.full((adapters,), SCALE, device=DEVICE)
    owner = torch.arange(32, device=DEVICE) % adapters
    index = owner.repeat_interleave(length)
    x, y = normal(len(index), WIDTH), normal(len(index), WIDTH)
    groups = grouped.group_rows(index, adapters)

    def usual(out: Tensor) -> Tensor:
        h = torch.bmm(x.view(32, length, WIDTH), a[owner].mT) * SCALE
        return out.view(32, length, WIDTH).baddbmm_(h, b[owner].mT).view_as(out)

    return Case(
        lambda out: grouped.add_grouped_product_(out, x, a, b, scales, groups),
        usual, usual, size(x) + 2 * size(y) + size(a) + size(b), y,
    )  # fmt: skip


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Random numbers on the device, of the size that a unit vector's entries have."""
    return (torch.randn(*shape, device=DEVICE) / math.sqrt(shape[-1])).to(dtype)


def size(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def difference(found: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """The largest norm of a difference, relative to that of what was expected."""
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    return max(float((f.float() - e.float()).norm() / e.float().norm()) for f, e in pairs)
