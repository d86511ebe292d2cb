"""How the embedded few-shot model was made: MiniLM is given the masked-language-model head that it comes without.

    python examples/minilm_masked_lm.py --data ../shared/data --out runs/minilm-masked-lm

MiniLM (extra `demo`) is a sentence encoder: its files have no output head. Here a head is put on it (its matrix is the
token embedding; its bias starts as the words' log-frequencies), and the head and a LoRA in all linears of the body
learn to fill in hidden words of public-domain books, Wikipedia sentences and speeches: 1,600 steps of 64 lines. It is
written in bfloat16 to OUT/minilm (2.4 MB), the folder that lies in the package. --resume goes on with a stopped run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from inlay.tasks.masked_lm import MaskedLM
from inlay.train import Run, train
from inlay.train.demo import demonstration_model

TEXTS = ("books_train.txt.gz", "wikipedia_sentences.txt.gz", "us_speeches.txt.gz")
HELD_OUT = "books_validation.txt.gz"
PUBLISHED_AS = "sentence-transformers/all-MiniLM-L6-v2"
FEWEST_WORDS = 4


def lines(path: Path) -> list[str]:
    """The lines of a text that have some words in them."""
    text = gzip.decompress(path.read_bytes()).decode()
    return [line.strip() for line in text.split("\n") if len(line.split()) >= FEWEST_WORDS]


def written(path: Path, rows: list[str]) -> str:
    """The rows as a file."""
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def with_head(rows: list[str], out: Path) -> Path:
    """MiniLM with a new head, as a folder."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_pretrained(demonstration_model())
    tokenizer = AutoTokenizer.from_pretrained(demonstration_model())
    counts = torch.full((len(tokenizer),), 0.5)
    for start in range(0, len(rows), 1000):
        for ids in tokenizer(rows[start : start + 1000], add_special_tokens=False)["input_ids"]:
            counts.index_add_(0, torch.tensor(ids), torch.ones(len(ids)))
    frequency = (counts / counts.sum()).log()
    model.cls.predictions.bias.data.copy_(frequency - frequency.mean())
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    return out / "base"


def settings(base: Path, training: str, validation: str, out: Path) -> Run:
    """The run."""
    return Run(
        model=str(base),
        task={"kind": "masked-lm", "max_length": 128},
        data={"train": training, "validation": validation},  # type: ignore[arg-type]
        method=[
            {"kind": "lora", "r": 24, "alpha": 24, "targets": "attention,ffn"},
            {"kind": "freezing", "targets": r"re:cls\.predictions\.(bias|transform.*)"},
        ],
        train={
            "per_device_train_batch_size": 64, "learning_rate": 2e-3, "train_sampling_strategy": "group_by_length",
            "max_steps": 1600, "lr_scheduler_type": "linear", "warmup_steps": 60, "logging_steps": 20,
            "eval_strategy": "steps", "eval_steps": 200, "save_strategy": "steps", "save_steps": 200,
        },
        dtype="bfloat16",
        out=str(out / "run"),
    )  # fmt: skip


def packed(adapter: Path, out: Path) -> Path:
    """The adapter in bfloat16, under the name that its base is published by."""
    out.mkdir(parents=True, exist_ok=True)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(adapter / "adapter_model.safetensors")
    halved = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(halved, out / "adapter_model.safetensors", metadata=metadata)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = PUBLISHED_AS
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def perplexity(model: Path, rows: list[str]) -> float:
    """On hidden words of these lines, before any training."""
    from datasets import Dataset

    task = MaskedLM(max_length=128, columns={"text": "text"})
    loaded = task.load_model(model)
    return task.evaluate(loaded, task.load_tokenizer(model), Dataset.from_dict({"text": rows}))["perplexity"]


def main() -> None:
    """Make the model; print its perplexity before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds text/")
    parser.add_argument("--out", type=Path, default=Path("runs/minilm-masked-lm"))
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [line for name in TEXTS for line in lines(arguments.data / "text" / name)]
    held_out = lines(arguments.data / "text" / HELD_OUT)[:400]
    random.Random(0).shuffle(rows)
    base = with_head(rows, arguments.out)
    before = perplexity(base, held_out)
    training = written(arguments.out / "train.jsonl", rows)
    validation = written(arguments.out / "validation.jsonl", held_out)
    record = train(settings(base, training, validation, arguments.out), resume=arguments.resume)
    after = record.metrics["validation"]["perplexity"]
    folder = packed(arguments.out / "run" / "adapter", arguments.out / "minilm")
    print(f"perplexity {before:,.1f} before, {after:.1f} after; {folder}")


if __name__ == "__main__":
    main()
