"""Peak memory of one training step above the resting level: floor, Inlay and HF peft, each in a process of its own.

    python benchmarks/memory.py               # 5 repeats of every variant, benchmarks/results/memory.json
    python benchmarks/memory.py --quick       # 3 repeats, to results/short/

The peak is what the kernel keeps as VmHWM, set back to the resident size just before the step (writing 5 to
/proc/self/clear_refs, Linux). `ru_maxrss` cannot be set back and would report the peak of making the model; a sampling
thread competes with the step for the one core, and misses short peaks. Rest is the resident size after one step of
full size has been taken and forgotten (gradients dropped, free memory given back): libraries are then loaded and the
buffers of matrix products made. The allocator is told to map blocks from 64 KiB on by themselves and to return them at
once, so that resident means in use. Model: 6 layers, batch 8 × 256, bf16; what is measured is forward, loss and
backward, with the gradients made anew.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _protocol as protocol
import torch
from report import Bound, judged, line
from torch import nn

RANK, ALPHA, DROPOUT = 16, 4.8, 0.1
REPEATS = 5
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
             "OMP_NUM_THREADS": "1"}  # fmt: skip
PARTS: dict[str, tuple[dict[str, Any], list[Bound]]] = {
    "lora-bf16": ({}, [Bound("LoRA r16 all, bf16", "peak_bytes", "inlay", "peft", 0.72)]),
    "dropout-bf16": (
        {"dropout": DROPOUT}, [Bound("LoRA r16 all, dropout 0.1, bf16", "peak_bytes", "inlay", "peft", 0.55)]
    ),
    "dora-bf16": ({"dora": True}, [Bound("DoRA r16 all, bf16", "peak_bytes", "inlay", "peft", 0.50)]),
}  # fmt: skip
"""By part, what the adapter is, and the bounds; those against peft(n) and the floor are added."""


def floor(model: nn.Module, **fields: Any) -> nn.Module:
    """No adapter."""
    return protocol.floor(model)


def ours(model: nn.Module, dropout: float = 0.0, dora: bool = False) -> nn.Module:
    """The adapter in Inlay."""
    import inlay

    method = inlay.DoRA if dora else inlay.LoRA
    return inlay.attach(model, method(r=RANK, alpha=ALPHA, targets="all-linear", dropout=dropout))


def theirs(model: nn.Module, dropout: float = 0.0, dora: bool = False, cast: bool = True) -> nn.Module:
    """The adapter in HF peft."""
    import peft

    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=dropout, use_dora=dora
    )  # fmt: skip
    return peft.get_peft_model(model, config, autocast_adapter_dtype=cast)


def theirs_uncast(model: nn.Module, **fields: Any) -> nn.Module:
    """The adapter in HF peft, in the dtype of the base."""
    return theirs(model, cast=False, **fields)


# One line a variant; one with an option of Inlay's goes here too.
VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "floor": floor, "peft": theirs, "peft(n)": theirs_uncast, "inlay": ours,
}  # fmt: skip


# -- one process -------------------------------------------------------------------------------------------------------


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for entry in Path("/proc/self/status").read_text().splitlines():
        if entry.startswith(key):
            return 1024 * int(entry.split()[1])
    raise SystemExit(f"/proc/self/status has no {key}: this benchmark needs Linux")


def rest() -> int:
    """Give free memory back, and say what is still resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def one(part: str, variant: str) -> dict[str, int]:
    """Peak and rest of one variant, in the process that this is called in."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="peft|transformers")
    model = VARIANTS[variant](protocol.llama(protocol.LLAMA6, torch.bfloat16), **PARTS[part][0])
    tensors = protocol.adapter_tensors(model)
    protocol.fill(tensors, protocol.draw(tensors), variant)
    ids = protocol.batch(protocol.LLAMA6)
    protocol.loss_of(model, ids).backward()
    protocol.clear(model)
    at_rest = rest()
    Path("/proc/self/clear_refs").write_text("5")
    protocol.loss_of(model, ids).backward()
    return {"rest_bytes": at_rest, "peak_bytes": resident("VmHWM") - at_rest}


# -- all of them -------------------------------------------------------------------------------------------------------


def run(part: str, variant: str) -> dict[str, int]:
    """`one` in a process of its own."""
    command = [sys.executable, __file__, "--one", part, variant]
    done = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{part}, {variant}:\n{done.stderr}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(part: str, repeats: int) -> dict[str, Any]:
    """Every variant so many times, in an order drawn anew for each repeat."""
    order, names = random.Random(3), list(VARIANTS)
    known: dict[str, dict[str, list[int]]] = {name: {"rest_bytes": [], "peak_bytes": []} for name in names}
    for _ in range(repeats):
        order.shuffle(names)
        for name in names:
            for key, value in run(part, name).items():
                known[name][key].append(value)
    bounds = [*PARTS[part][1]]
    title = bounds[0].quantity
    bounds += [Bound(title, "peak_bytes", name, over, None)
               for name in VARIANTS if name.startswith("inlay") for over in ("peft(n)", "floor")]  # fmt: skip
    return {"variants": known, "bounds": [judged(bound, known) for bound in bounds]}


def table(record: dict[str, Any]) -> str:
    """Every variant of a part in a line, then the bounds."""
    lines = [f"  {'':<24}{'MiB at the peak':>16}{'lowest':>9}{'highest':>9}{'MiB at rest':>13}"]
    for name, about in record["variants"].items():
        peaks = [peak / 2**20 for peak in about["peak_bytes"]]
        at_rest = statistics.median(about["rest_bytes"]) / 2**20
        lines.append(f"  {name:<24}{statistics.median(peaks):16.0f}{min(peaks):9.0f}{max(peaks):9.0f}{at_rest:13.0f}")
    return "\n".join([*lines, *map(line, record["bounds"])])


def main() -> None:
    """Measure the parts asked for, print and store each as it ends."""
    parser = protocol.arguments(__doc__, rounds=REPEATS)
    parser.add_argument("--one", nargs=2, metavar=("PART", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one)))
        return
    results = protocol.Results("memory", options, least=REPEATS)
    repeats = results.rounds
    for part in protocol.chosen(list(PARTS), options.only):
        settings = {"rounds": repeats, "rank": RANK, "alpha": ALPHA, "shape": dataclasses.asdict(protocol.LLAMA6),
                    "allocator": ALLOCATOR, "variants": list(VARIANTS)}  # fmt: skip
        record = results.part(part, settings, functools.partial(measure, part, repeats))
        print(f"{part}\n{table(record)}\n", flush=True)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
