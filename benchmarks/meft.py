"""What a training step keeps with MEFT, with other methods and with full fine-tuning; and what inversion costs in time.

    python benchmarks/meft.py            # benchmarks/results/meft.json; about two minutes on one core

BERT-base's shape with random weights, fp32, dropout 0.1. Bytes are those that autograd holds when the forward ends,
without parameters and buffers (`inlay.train.saved.profile`), at batch 8 × 128. Seconds are CPU time of the process for
forward, loss and backward at batch 2 × 128 on one thread; the variants take turns, and a ratio is the median over
rounds of the ratio to full fine-tuning within a round. The error is that of `inlay.reconstruction_error`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import inlay
from inlay.train.saved import profile

ROUNDS = 5
VARIANTS: dict[str, Any] = {
    "full": inlay.FullFineTuning(),
    "lora": inlay.LoRA(r=8),
    "adapter-parallel": inlay.Adapter(placement="parallel", bottleneck=8, init="bert"),
    "full, every block checkpointed": inlay.FullFineTuning(),
    "adapter-parallel, every block checkpointed": inlay.Adapter(placement="parallel", bottleneck=8, init="bert"),
    "meft-1": inlay.MEFT(variant=1),
    "meft-2": inlay.MEFT(variant=2),
    "meft-3": inlay.MEFT(variant=3),
    "meft-1, authors": inlay.MEFT(variant=1, compat="authors"),
    "meft-3, authors": inlay.MEFT(variant=3, compat="authors"),
}


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of random tokens, with labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}


def made(name: str) -> Any:
    """The model with a method in it, in training mode."""
    torch.manual_seed(0)
    model = inlay.attach(BertForSequenceClassification(BertConfig()), VARIANTS[name]).train()
    if "checkpointed" in name:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def kept(model: Any) -> int:
    """Bytes that one step of 8 × 128 keeps."""
    given = batch(8, 128)
    return profile(model, [], lambda: model(**given).loss).total


def seconds(model: Any) -> float:
    """CPU time of one step of 2 × 128."""
    given = batch(2, 128)
    begun = time.process_time()
    model(**given).loss.backward()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    timed = [name for name in VARIANTS if name in ("full", "lora", "meft-1", "meft-2", "meft-3") or "par" in name]
    models = {}
    for name in VARIANTS:
        model = made(name)
        results[name] = {"kept_bytes": kept(model)}
        results[name]["of_full"] = results[name]["kept_bytes"] / results["full"]["kept_bytes"]
        if name.startswith("meft"):
            found = inlay.reconstruction_error(model.eval(), **batch(2, 128))
            results[name] |= {"worst_error": found.worst, "bound": found.bound}
        if name in timed:
            models[name] = model.train()
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name in random.sample(timed, len(timed)):
            times[name].append(seconds(models[name]))
    for name in timed:
        ratios = [one / full for one, full in zip(times[name], times["full"], strict=True)]
        results[name]["seconds_of_full"] = statistics.median(ratios)
    path = Path(__file__).parent / "results" / "meft.json"
    path.write_text(json.dumps({"torch": torch.__version__, "rounds": rounds, "results": results}, indent=1) + "\n")
    for name, found in results.items():
        print(f"{name:45} " + "  ".join(f"{key} {value:.3g}" for key, value in found.items()))


if __name__ == "__main__":
    main()
