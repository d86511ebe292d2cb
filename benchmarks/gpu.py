"""On a CUDA device: a training step over its floor, plain and with the Triton kernels, and each kernel by itself.

    python benchmarks/gpu.py                      # all parts: minutes; benchmarks/results/gpu/*.json
    python benchmarks/gpu.py --only kernels,lora  # parts by the beginning of their names
    python benchmarks/gpu.py --quick              # 3 rounds of a small model, to results/gpu/short/

Steps: a random Llama of hidden size 4096 in bf16 with 8,192 tokens and r = 16 on all linears, against HF peft as it
comes ("peft") and with its adapters in the dtype of the base ("peft(n)"). "inlay" has the Triton kernels switched off.
Kernels: the same sizes, against what one would write in torch, with the bytes that each has to move.

Time is between CUDA events, all variants interleaved in random order; outputs and gradients are compared first. Before
each kernel the cache is overwritten, which also lets the launches queue. Without a CUDA device it says so and exits
with 2.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _gpu_kernels as kernels
import _protocol as protocol
import torch
from report import Bound, judged, line
from torch import nn

RESULTS = Path(__file__).parent / "results" / "gpu"
DEVICE = "cuda"
RANK, ALPHA, P = 16, 4.8, 0.1
LLAMA = protocol.Shape(layers=4, hidden=4096, mlp=11008, heads=32, vocabulary=32000, batch=4, length=2048)
SMALL = protocol.Shape(layers=2, hidden=1024, mlp=2816, heads=8, vocabulary=8192, batch=2, length=512)
GRADIENTS_OFF = 1.25
"""How far off Inlay's gradients may be at most, over those of peft(n): both are set by the rounding of the base."""
KERNEL_OFF = 2e-2
"""The most by which a kernel may differ from its reference in bf16, relative to its norm."""

Step = Callable[[], Any]


# -- time --------------------------------------------------------------------------------------------------------------


def event_seconds(step: Step, before: Step = lambda: None) -> float:
    """Seconds on the device for one call; what `before` launches is not counted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def interleaved(steps: Mapping[str, Step], rounds: int, before: Step = lambda: None) -> dict[str, list[float]]:
    """Seconds of each step in each round, the order drawn anew for every round; three calls of each come first."""
    order, names = random.Random(3), list(steps)
    for _ in range(3):
        for name in names:
            steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            seconds[name].append(event_seconds(steps[name], before))
    return seconds


# -- a training step ---------------------------------------------------------------------------------------------------


def variants(method: str, mine: dict[str, Any], others: dict[str, Any]) -> dict[str, protocol.Adapt]:
    """How each variant changes the base; `mine` and `others` mean the same."""
    import peft

    import inlay

    mine = {"r": RANK, "alpha": ALPHA, "targets": "all-linear"} | mine
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", **others)

    def ours(model: nn.Module) -> nn.Module:
        return inlay.attach(model, getattr(inlay, method)(**mine))

    return {
        "floor": protocol.floor,
        "peft": lambda model: peft.get_peft_model(model, config),
        "peft(n)": lambda model: peft.get_peft_model(model, config, autocast_adapter_dtype=False),
        "inlay": ours,
        "inlay, Triton": ours,
    }


PARTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[Bound]]] = {
    "lora": ("LoRA", {}, {}, [
        Bound("LoRA r16 all", "seconds", "inlay", "floor", 1.15),
        Bound("LoRA r16 all", "seconds", "inlay, Triton", "floor", 1.08, 1.05),
        Bound("LoRA r16 all", "seconds", "inlay", "peft", 0.85),
        Bound("LoRA r16 all", "seconds", "inlay, Triton", "peft(n)", None),
        Bound("LoRA r16 all", "saved_bytes", "inlay, Triton", "peft", 0.68),
    ]),
    "dropout": ("LoRA", {"dropout": P}, {"lora_dropout": P}, [
        Bound("LoRA r16 all, dropout 0.1", "seconds", "inlay, Triton", "floor", None),
        Bound("LoRA r16 all, dropout 0.1", "seconds", "inlay, Triton", "inlay", None),
        Bound("LoRA r16 all, dropout 0.1", "seconds", "inlay, Triton", "peft", None),
        Bound("LoRA r16 all, dropout 0.1", "saved_bytes", "inlay, Triton", "peft", 0.60),
    ]),
    "dora": ("DoRA", {}, {"use_dora": True}, [
        Bound("DoRA r16 all", "seconds", "inlay, Triton", "floor", None),
        Bound("DoRA r16 all", "seconds", "inlay, Triton", "inlay", None),
        Bound("DoRA r16 all", "seconds", "inlay, Triton", "peft", 0.65),
        Bound("DoRA r16 all", "saved_bytes", "inlay, Triton", "peft", 0.50),
    ]),
}  # fmt: skip


class Switch:
    """The Triton kernels on or off, as the library asks for them; counts how often it did."""

    def __init__(self) -> None:
        from inlay.kernels import triton

        self.module, self.real, self.asked = triton, triton.available, 0

    def around(self, step: Step, on: bool) -> Step:
        """The step with the kernels on or off."""

        def available(*operands: Any, **named: Any) -> bool:
            self.asked += 1
            return on and self.real(*operands, **named)

        def run() -> Any:
            self.module.available = available
            try:
                return step()
            finally:
                self.module.available = self.real

        return run


def reference_of(model: nn.Module, ids: torch.Tensor) -> tuple[protocol.Values, protocol.Outcome]:
    """The adapter's values, and the step that they give with this base of higher precision."""
    tensors = protocol.adapter_tensors(model)
    values = protocol.draw({name: tensor.detach().cpu() for name, tensor in tensors.items()})
    protocol.fill(tensors, values, "the reference")
    return values, protocol.outcome(model.eval(), tensors, ids)


def measure_step(part: str, shape: protocol.Shape, rounds: int) -> dict[str, Any]:
    """Errors, saved bytes, peak memory and seconds of every variant of a part, and its bounds."""
    method, mine, others, bounds = PARTS[part]
    ids = protocol.batch(shape).to(DEVICE)
    with torch.device(DEVICE):
        base = protocol.llama(shape, torch.bfloat16)
    adapts, switch = variants(method, mine, others), Switch()
    values, reference = reference_of(adapts["peft"](copy.deepcopy(base).float()), ids)
    known: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name, adapt in adapts.items():
        model = adapt(copy.deepcopy(base))
        tensors, fused = protocol.adapter_tensors(model), name.endswith("Triton")
        about = known[name] = {}
        if tensors:  # dropout's masks differ: losses and gradients are compared without
            protocol.fill(tensors, values, name)
            compared = switch.around(lambda m=model, t=tensors: protocol.outcome(m, t, ids), fused)
            model.eval()
            about["errors"] = compared().error(reference)
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        about["saved_bytes"] = switch.around(lambda m=model: protocol.saved_bytes(m, ids), fused)()
        steps[name] = switch.around(protocol.training_step(model, ids, trained), fused)
        about["peak_bytes"] = peak(steps[name])
    check(known)
    for name, seconds in interleaved(steps, rounds).items():
        known[name]["seconds"] = [round(second, 6) for second in seconds]
    known["inlay, Triton"]["asked_for_kernels"] = switch.asked
    if not switch.asked:
        print('  the library asked for no Triton kernel: "inlay, Triton" is "inlay"')
    return {"variants": known, "bounds": [judged(bound, known) for bound in bounds]}


def peak(step: Step) -> int:
    """Bytes of device memory above the resting level during a step."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - resting


def check(known: Mapping[str, Mapping[str, Any]]) -> None:
    """End here, before any time is taken, if Inlay's gradients are further off than rounding explains."""
    most = GRADIENTS_OFF * known["peft(n)"]["errors"]["gradients"]
    for name, about in known.items():
        if "errors" in about:
            print("  errors of {:<16} loss {loss:.1e}, gradients {gradients:.1e}".format(name, **about["errors"]))
            if name.startswith("inlay") and about["errors"]["gradients"] > most:
                raise SystemExit(f"{name}: gradients are off by more than {most:.1e}; nothing was timed")


# -- the kernels -------------------------------------------------------------------------------------------------------


def measure_kernels(rounds: int) -> dict[str, Any]:
    """For each kernel the difference from its reference, the seconds of both, and the bytes a second it reaches."""
    cache = torch.empty(2**30 if DEVICE == "cuda" else 1, dtype=torch.uint8, device=DEVICE)
    known: dict[str, Any] = {}
    for maker in kernels.cases().values():
        for name, case in maker().items():
            off, scratch = case.difference(), case.target.clone()
            if off > KERNEL_OFF:
                raise SystemExit(f"{name}: off by {off:.1e} from its reference; nothing was timed")
            steps = {"fused": functools.partial(case.fused, scratch), "torch": functools.partial(case.usual, scratch)}
            seconds = interleaved(steps, rounds, cache.zero_)
            fused, usual = (statistics.median(seconds[side]) for side in steps)
            rate = case.bytes / fused / 1e9
            known[name] = {
                "difference": off, "bytes": case.bytes, "gigabytes_per_second": round(rate),
                "ratio": round(fused / usual, 4), "seconds": seconds,
            }  # fmt: skip
            text = "  {:<32} {:8.1f} µs, torch {:8.1f} µs, {:.2f} ×, {:5.0f} GB/s, off by {:.0e}"
            print(text.format(name, 1e6 * fused, 1e6 * usual, fused / usual, rate, off), flush=True)
    return {"kernels": known}


# -- results -----------------------------------------------------------------------------------------------------------


def device() -> dict[str, Any]:
    """What was measured on."""
    import triton

    facts = torch.cuda.get_device_properties(0)
    return {
        "device": facts.name, "multiprocessors": facts.multi_processor_count, "bytes": facts.total_memory,
        "capability": f"{facts.major}.{facts.minor}", "cuda": torch.version.cuda, "triton": triton.__version__,
    }  # fmt: skip


def main() -> int:
    """Measure the parts asked for; 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="3 rounds of a small model, to see that it runs")
    parser.add_argument("--only", default="", help="parts by the beginning of their names: kernels,lora")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch sees none here; nothing was measured", file=sys.stderr)
        return 2
    rounds, shape = (3, SMALL) if options.quick else (options.rounds, LLAMA)
    folder = RESULTS / "short" if options.quick or rounds < protocol.FULL else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    for part in protocol.chosen(["kernels", *PARTS], options.only):
        print(part, flush=True)
        load = os.getloadavg()[0]
        record = measure_kernels(rounds) if part == "kernels" else measure_step(part, shape, rounds)
        record |= {"rounds": rounds, "environment": protocol.environment(load) | device()}
        if part != "kernels":
            record["shape"] = dataclasses.asdict(shape)
            print("\n".join("  " + line(row) for row in record["bounds"]))
        (folder / f"{part}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
