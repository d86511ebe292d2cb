"""Mixed batches: another adapter for each row of one batch, in Inlay and HF peft, over the base model alone.

    python benchmarks/mixed.py                # all parts, 9 rounds, to benchmarks/results/mixed.json
    python benchmarks/mixed.py --only 1-token # parts by the beginning of their names
    python benchmarks/mixed.py --quick        # 3 rounds, to results/short/

LoRA r8 on all linears of a bf16 Llama, 32 sequences, one forward without gradients. "inlay" is `per_row` with the
rows of the call before, as when a batch is decoded token by token; "inlay, other rows" shuffles them before every
call. "peft" is `adapter_names` as it comes, "peft(n)" the same with `autocast_adapter_dtype=False`. The protocol is in
`_protocol.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import _protocol as protocol
import peft
import torch
from report import Bound, judged, line
from torch import Tensor, nn

import inlay

RANK, ALPHA, SEQUENCES = 8, 4.8, 32
TOLERANCE = 5e-2
"""Of the logits, relative to their norm: the base's own rounding to bf16 sets it. Also ≤ 1.25 × peft(n)'s error."""


@dataclasses.dataclass(frozen=True)
class Part:
    """So many adapters, and so many tokens a sequence."""

    adapters: int
    tokens: int
    bound: float

    @property
    def bounds(self) -> list[Bound]:
        title = f"mixed batch, {SEQUENCES} sequences, S={self.tokens}, {self.adapters} adapters"
        return [
            Bound(title, "seconds", "inlay", "peft", self.bound),
            Bound(title, "seconds", "inlay", "peft(n)", None),
            Bound(title, "seconds", "inlay", "base", None, 1.3),
            Bound(title, "seconds", "inlay, other rows", "peft", None, self.bound),
            Bound(title, "seconds", "inlay, other rows", "base", None, 1.3),
            Bound(title, "seconds", "inlay, one adapter", "peft, one adapter", None),
        ]


PARTS = {
    "1-token-8": Part(adapters=8, tokens=1, bound=0.60),
    "1-token-32": Part(adapters=32, tokens=1, bound=0.35),
    "32-tokens-8": Part(adapters=8, tokens=32, bound=0.62),
    "32-tokens-32": Part(adapters=32, tokens=32, bound=0.62),
}


# -- models ------------------------------------------------------------------------------------------------------------


def ours(names: Sequence[str], dtype: torch.dtype) -> nn.Module:
    """Inlay with these adapters, the first one active."""
    model = protocol.llama(protocol.LLAMA4, dtype, torch.bfloat16)
    for name in names:
        inlay.attach(model, inlay.LoRA(r=RANK, alpha=ALPHA, targets="all-linear"), name)
        fill(model, name)
    inlay.activate(model, names[0])
    return model.eval()


def theirs(names: Sequence[str], dtype: torch.dtype, cast: bool = True) -> nn.Module:
    """HF peft with these adapters, the first one active."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    base = protocol.llama(protocol.LLAMA4, dtype, torch.bfloat16)
    model = peft.get_peft_model(base, config, adapter_name=names[0], autocast_adapter_dtype=cast)
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=cast)
    for name in names:
        fill(model, name)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module, name: str) -> None:
    """Random values that the number in the adapter's name decides, the same in both libraries, each a bf16 number."""
    generator = torch.Generator().manual_seed(int(name[1:]))
    ending = {f".inlays.{name}.lora.lora_A", f".inlays.{name}.lora.lora_B"}
    ending |= {f".lora_A.{name}.weight", f".lora_B.{name}.weight"}
    own = {key: p for key, p in model.named_parameters() if key.endswith(tuple(ending))}
    for key, parameter in own.items():
        noise = torch.randn(parameter.shape, generator=generator)
        size = 1 / math.sqrt(parameter.shape[1]) if ".lora_A" in key else 0.05
        parameter.copy_((noise * size).bfloat16())


# -- measuring ---------------------------------------------------------------------------------------------------------


def calls(part: Part, names: Sequence[str], rows: list[str], ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    """One forward of each variant."""
    dtype = torch.bfloat16
    base = protocol.llama(protocol.LLAMA4, dtype).eval()
    one, mixed, shuffled = (ours(names, dtype) for _ in range(3))
    peft_model, peft_narrow = theirs(names, dtype), theirs(names, dtype, cast=False)
    order = random.Random(5)

    def per_row(model: nn.Module, rows: list[str]) -> Tensor:
        with inlay.per_row(model, rows):
            return logits(model, ids)

    return {
        "base": lambda: logits(base, ids),
        "inlay, one adapter": lambda: logits(one, ids),
        "inlay": lambda: per_row(mixed, rows),
        "inlay, other rows": lambda: per_row(shuffled, order.sample(rows, len(rows))),
        "peft, one adapter": lambda: logits(peft_model, ids),
        "peft": lambda: logits(peft_model, ids, adapter_names=rows),
        "peft(n)": lambda: logits(peft_narrow, ids, adapter_names=rows),
    }


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """The output of one forward."""
    result: Tensor = model(input_ids=ids, **options).logits
    return result


def errors(part: Part, names: Sequence[str], rows: list[str], ids: Tensor) -> dict[str, float]:
    """How far outputs are from those of HF peft over the same base in fp32, relative to their norm."""
    reference = logits(theirs(names, torch.float32), ids, adapter_names=rows).double()
    inlay_model, peft_model = ours(names, torch.bfloat16), theirs(names, torch.bfloat16, cast=False)
    exact = ours(names, torch.float32)
    found = {"peft(n)": logits(peft_model, ids, adapter_names=rows)}
    alone = []
    for number, name in enumerate(rows):
        with inlay.using(inlay_model, name):
            alone.append(logits(inlay_model, ids[number : number + 1]))
    found["inlay, row by row"] = torch.cat(alone)
    for model, title in ((inlay_model, "inlay"), (exact, "inlay, fp32")):
        with inlay.per_row(model, rows):
            found[f"{title}, first call"] = logits(model, ids)
            found[f"{title}, later calls"] = [logits(model, ids) for _ in range(2)][-1]
    return {name: float((y.double() - reference).norm() / reference.norm()) for name, y in found.items()}


def measure(part: Part, rounds: int) -> dict[str, Any]:
    """Errors, seconds of every variant, bounds."""
    names = [f"a{number}" for number in range(part.adapters)]
    rows = [names[number % part.adapters] for number in range(SEQUENCES)]
    shape = dataclasses.replace(protocol.LLAMA4, batch=SEQUENCES, length=part.tokens)
    ids = protocol.batch(shape)
    off = errors(part, names, rows, ids)
    print("  errors: " + ", ".join(f"{name} {error:.1e}" for name, error in off.items()))
    for name, error in off.items():
        most = 1e-5 if "fp32" in name else min(TOLERANCE, 1.25 * off["peft(n)"])
        if name != "peft(n)" and error > most:
            raise SystemExit(f"{name} is off by {error:.1e}, more than {most:.1e}")
    # A short forward takes milliseconds: several make one measurement.
    repeat = max(1, 32 // part.tokens // 2)
    steps = {name: _several(call, repeat) for name, call in calls(part, names, rows, ids).items()}
    seconds = protocol.interleaved(steps, rounds)
    known = {name: {"seconds": [round(one / repeat, 6) for one in every]} for name, every in seconds.items()}
    return {"errors": off, "variants": known, "bounds": [judged(bound, known) for bound in part.bounds]}


def _several(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def step() -> None:
        for _ in range(times):
            call()

    return step


def table(record: dict[str, Any]) -> str:
    """Every variant of a part in a line, then the bounds."""
    base = record["variants"]["base"]["seconds"]
    lines = [f"  {'':<24}{'CPU ms':>9}{'× base':>9}"]
    for name, about in record["variants"].items():
        times = statistics.median(a / b for a, b in zip(about["seconds"], base, strict=True))
        lines.append(f"  {name:<24}{1e3 * statistics.median(about['seconds']):9.2f}{times:9.3f}")
    return "\n".join([*lines, *map(line, record["bounds"])])


def main() -> None:
    """Measure the parts asked for, print and store each as it ends."""
    options = protocol.arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="peft|transformers")
    results = protocol.Results("mixed", options)
    for name in protocol.chosen(list(PARTS), options.only):
        part = PARTS[name]
        settings = {"rounds": results.rounds, "rank": RANK, "alpha": ALPHA, "sequences": SEQUENCES,
                    "tolerance": TOLERANCE, **dataclasses.asdict(part)}  # fmt: skip
        record = results.part(name, settings, functools.partial(measure, part, results.rounds))
        print(f"{name}\n{table(record)}\n", flush=True)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
