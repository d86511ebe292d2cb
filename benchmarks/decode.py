"""Generating a token at a time on a CPU in bf16, with weights packed and not: the base, LoRA in Inlay, LoRA in HF peft.

    python benchmarks/decode.py               # all parts, 9 rounds, to benchmarks/results/decode.json
    python benchmarks/decode.py --only lora-1 # parts by the beginning of their names
    python benchmarks/decode.py --quick       # 3 rounds, to results/short/

Greedy generation of 16 tokens after 16 with a cache, LoRA or DoRA r16 on all linears. "packed" is after `inlay.pack`.
That the tokens of a packed base are those of the base is shown first. The protocol is in `_protocol.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import _protocol as protocol
import peft
import torch
from report import Bound, judged, line
from torch import Tensor, nn

import inlay

RANK, ALPHA, TOKENS = 16, 12.0, 16
SHAPE = dataclasses.replace(protocol.QUANTISED, layers=6, length=2 * TOKENS)
PARTS = {"lora-1": ("LoRA", 1), "lora-4": ("LoRA", 4), "lora-16": ("LoRA", 16), "dora-1": ("DoRA", 1)}
"""Method, and sequences."""


def bounds(method: str, rows: int) -> list[Bound]:
    """No bound was set for these; the ratios are what they are."""
    title = f"generation, bf16, {method} r{RANK}, {rows} sequence" + "s" * (rows > 1)
    pairs = [("base, packed", "base"), ("inlay", "base"), ("inlay, packed", "base"), ("inlay, packed", "inlay"),
             ("inlay, packed", "peft"), ("inlay, packed", "peft(n)"), ("inlay", "peft"),
             ("inlay", "peft(n)")]  # fmt: skip
    return [Bound(title, "seconds", one, other, None) for one, other in pairs]


def base() -> nn.Module:
    """The model, which can remember keys and values."""
    model = protocol.llama(SHAPE, torch.bfloat16).eval().requires_grad_(False)
    model.config.use_cache = model.generation_config.use_cache = True
    return model


def models(method: str) -> dict[str, nn.Module]:
    """Every variant, with the same adapter."""
    found = {name: base() for name in ("base", "base, packed", "inlay", "inlay, packed", "peft", "peft(n)")}
    for name in ("inlay", "inlay, packed"):
        inlay.attach(found[name], getattr(inlay, method)(r=RANK, alpha=ALPHA, targets="all-linear"))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", use_dora=method == "DoRA")
    for name in ("peft", "peft(n)"):
        found[name] = peft.get_peft_model(found[name], config, autocast_adapter_dtype=name == "peft")
    values = protocol.draw(protocol.adapter_tensors(found["inlay"]))
    for name, model in found.items():
        if "base" not in name:
            protocol.fill(protocol.adapter_tensors(model), values, name)
        if "packed" in name:
            inlay.pack(model)
        model.eval()
    return found


@torch.no_grad()
def generate(model: nn.Module, ids: Tensor) -> Tensor:
    """The prompt and the tokens after it."""
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    tokens: Tensor = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    return tokens


def measure(method: str, rows: int, rounds: int) -> dict[str, Any]:
    """Equality, seconds of every variant, bounds."""
    ids = torch.randint(SHAPE.vocabulary, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    found = models(method)
    if not torch.equal(generate(found["base"], ids), generate(found["base, packed"], ids)):
        raise SystemExit("the packed base generates other tokens")
    with torch.no_grad():
        logits = {name: model(input_ids=ids).logits.double() for name, model in found.items()}
    reference = logits["peft"]
    adapted = {name: y for name, y in logits.items() if "base" not in name}
    errors = {name: float((y - reference).norm() / reference.norm()) for name, y in adapted.items()}
    if max(errors.values()) > 5e-2:
        raise SystemExit(f"logits differ: {errors}")
    steps: dict[str, Callable[[], Any]] = {
        name: (lambda model=model: generate(model, ids)) for name, model in found.items()
    }
    known = {name: {"seconds": every} for name, every in protocol.interleaved(steps, rounds).items()}
    return {"errors": errors, "variants": known, "bounds": [judged(bound, known) for bound in bounds(method, rows)]}


def table(record: dict[str, Any]) -> str:
    """Every variant of a part in a line, then the ratios."""
    first = record["variants"]["base"]["seconds"]
    lines = [f"  {'':<24}{'CPU ms':>9}{'× base':>9}"]
    for name, about in record["variants"].items():
        times = statistics.median(a / b for a, b in zip(about["seconds"], first, strict=True))
        lines.append(f"  {name:<24}{1e3 * statistics.median(about['seconds']):9.1f}{times:9.3f}")
    return "\n".join([*lines, *map(line, record["bounds"])])


def main() -> None:
    """Measure the parts asked for, print and store each as it ends."""
    options = protocol.arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="peft|transformers")
    results = protocol.Results("decode", options)
    for name in protocol.chosen(list(PARTS), options.only):
        method, rows = PARTS[name]
        settings = {"rounds": results.rounds, "rank": RANK, "alpha": ALPHA, "tokens": TOKENS, "method": method,
                    "sequences": rows, "shape": dataclasses.asdict(SHAPE)}  # fmt: skip
        record = results.part(name, settings, functools.partial(measure, method, rows, results.rounds))
        print(f"{name}\n{table(record)}\n", flush=True)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
