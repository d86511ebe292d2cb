"""Compile every kernel, as it would be launched first, for a GPU that need not be there. Run by test_compiles.py.

    python tests/kernels/triton/compile_all.py 80 90

Prints a line for each kernel and compute capability: its name, the capability, the bytes of shared memory.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inlay.kernels.triton import dora_norm, dropout, epilogue, gradients, grouped, nf4, partial_sums

X, F32, BYTES, LONG = "*bf16", "*fp32", "*u8", "*i64"
PRODUCT = {"BLOCK_R": 16, "PRECISION": "ieee"}
PLAN = {"order": LONG, "adapter": LONG, "start": LONG, "stop": LONG}
CODES = {"codes": BYTES, "absmax": BYTES, "table": F32, "levels": F32, "absmax2": F32, "offset": F32}
NF4 = {"SIZE": 64, "NESTED": True}
NORM = {"BLOCK_R": 16, "BLOCK_K": 16, "TINY": 1e-38}

# Pointers and constants of each kernel; what is in neither is an integer, but the scale and the seed.
KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (epilogue._add_product, {"y": X, "h": X, "b": F32}, PRODUCT),
    (gradients._gradients, {"dy": X, "h": X, "b": F32, "dh": F32, "db": F32}, {"BLOCK_O": 256, **PRODUCT}),
    (dropout._dropped_product, {"x": X, "a": F32, "parts": F32}, {"DROP": True, **PRODUCT}),
    (
        dropout._dropped_gradients,
        {"dx": X, "x": X, "dh": X, "a": F32, "parts": F32},
        {"BLOCK_C": 64, "DROP": True, "NEED_X": True, "NEED_A": True, **PRODUCT},
    ),
    (
        dora_norm._row_norms,
        {"w": X, "a": F32, "b": F32, "gram": F32, "squared": F32, "out": F32},
        {"SQUARED": True, "EXACT": False, **NORM},
    ),
    (
        dora_norm._row_norms,
        {"w": X, "a": X, "b": X, "gram": F32, "squared": F32, "out": F32},
        {"SQUARED": False, "EXACT": True, **NORM},
    ),
    (nf4._decode, {**CODES, "out": X}, NF4),
    (nf4._linear, {**CODES, "x": X, "parts": F32}, {"BLOCK_T": 16, "BLOCK_O": 64, "PRECISION": "ieee", **NF4}),
    (grouped._narrow, {**PLAN, "x": X, "a": F32, "h": F32}, {"ROWS": 16, **PRODUCT}),
    (grouped._widen, {**PLAN, "y": X, "h": F32, "b": F32, "scales": F32}, {"ROWS": 16, **PRODUCT}),
    (partial_sums._sum_parts, {"parts": F32, "out": X}, {"BLOCK": 1024}),
]


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int) -> Any:
    """The first configuration of a kernel, compiled."""
    options: dict[str, Any] = {}
    if hasattr(kernel, "configs"):
        first = kernel.configs[0]
        options = {"num_warps": first.num_warps, "num_stages": first.num_stages}
        kernel, constants = kernel.fn, constants | first.kwargs
    unknown = (pointers.keys() | constants.keys()) - set(kernel.arg_names)
    assert not unknown, f"{kernel.fn.__name__} has no {sorted(unknown)}"
    scalars = {"scale": "fp32", "seed": "i64"}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name) or scalars.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): v for name, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for kernel, pointers, constants in KERNELS:
            made = compiled(kernel, pointers, constants, capability)
            print(made.metadata.name, capability, made.metadata.shared, flush=True)


if __name__ == "__main__":
    main()
