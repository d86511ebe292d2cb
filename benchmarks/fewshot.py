"""Few-shot systems side by side: the same splits, the same base, the same rows to measure on.

    python benchmarks/fewshot.py --data ../shared/data
    python benchmarks/fewshot.py --data ../shared/data --tasks sst2 --systems prompt-lora,pet --shots 16 --seeds 1
    python benchmarks/fewshot.py --table                       # only write docs/benchmarks/few-shot.md anew

Every system gets the same few labelled rows, 5 splits for each number of shots per class, and no look at the test
rows. SETTINGS hold for all; only the learning rate goes by what is trained (RATES), as `benchmarks/fewshot_rates.py`
found it on the validation rows of another set, English MasakhaNEWS. The base is the embedded MiniLM with its
masked-language-model head; `icl-decoder` and `t-few-decoder` run on the small decoder stories260k, where causal scoring
is wanted. Test rows are the first `test_rows` of the published test file, in an order that SHA-256 of the row decides.
Writes benchmarks/results/fewshot/<task>.json after every split, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _fewshot_chart import draw
from _fewshot_page import page, read

from inlay.errors import InlayError
from inlay.fewshot import FewShotRun, fewshot

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fewshot"
TABLE = ROOT / "docs" / "benchmarks" / "few-shot.md"
SHOTS = (8, 16, 32)
SEEDS = (13, 21, 42, 87, 100)
SETTINGS: dict[str, Any] = {
    "steps": 60, "batch_size": 8, "dtype": "bfloat16", "max_length": 48, "pair_length": 96,
    "test_rows": 300, "unlabelled_rows": 300,
}  # fmt: skip
RATES = {"full": 2e-4, "lora": 2e-3, "ia3": 3e-2, "adapter": 1e-2, "bitfit": 3e-3}
"""The learning rate for what is trained: the best found."""

TASKS: dict[str, dict[str, Any]] = {
    "sst2": {
        "files": "text_classification/sst2",
        "templates": ["{text} It was {mask}.", "{text} All in all, it was {mask}.", "Just {mask}! {text}"],
        "verbalizer": {"negative": "terrible", "positive": "great"},
    },
    "subj": {
        "files": "text_classification/subj",
        "templates": ["{text} This is {mask}.", "{text} That was {mask}.", "{mask}: {text}"],
        "verbalizer": {"subjective": "subjective", "objective": "objective"},
    },
    "ag_news": {
        "files": "text_classification/ag_news",
        "templates": ["{mask}: {text}", "{mask} News: {text}", "[ Category: {mask} ] {text}", "{text} Topic: {mask}"],
        "verbalizer": {"World": "World", "Sports": "Sports", "Business": "Business", "Sci/Tech": "Tech"},
    },
    "tweet_eval_emotion": {
        "files": "text_classification/tweet_eval_emotion",
        "templates": ["{text} I feel {mask}.", "{text} It was {mask}.", "{text} This makes me {mask}."],
        "verbalizer": {"anger": "angry", "joy": "happy", "optimism": "hopeful", "sadness": "sad"},
    },
    "masakhanews_hau": {
        "files": "text_classification/masakhanews_hau",
        "templates": ["{mask}: {text}", "{mask} News: {text}", "[ Category: {mask} ] {text}", "{text} Topic: {mask}"],
        "verbalizer": {
            name: name
            for name in ("business", "entertainment", "health", "politics", "religion", "sports", "technology")
        },
    },
    "rte": {
        "files": "nli/rte",
        "templates": [
            "{premise|strip_punctuation}? {mask}, {hypothesis|lower_first}",
            "{hypothesis|strip_punctuation}? {mask}. {premise}",
            "{premise} Question: {hypothesis|strip_punctuation}? Answer: {mask}.",
        ],
        "verbalizer": {"entailment": "yes", "not_entailment": "no"},
    },
    "cb": {
        "files": "nli/cb",
        "templates": [
            "{premise|strip_punctuation}? {mask}, {hypothesis|lower_first}",
            "{hypothesis|strip_punctuation}? {mask}. {premise}",
            "{premise} Question: {hypothesis|strip_punctuation}? Answer: {mask}.",
        ],
        "verbalizer": {"entailment": "yes", "contradiction": "no", "neutral": "maybe"},
    },
}
LORA = {"kind": "lora", "r": 8, "targets": "attention,ffn"}
PET = {"repetitions": 1, "auxiliary": 0, "final": {"steps": 60, "batch_size": 16}}
"""Its authors' 3 repetitions, masked-LM term (of weight 1e-4) and 5,000 last steps are beyond a grid on two cores."""
PATTERNS = {"peft": [LORA], "patterns": 3}
SYSTEMS: dict[str, dict[str, Any]] = {
    "standard-full": {"method": "standard", "peft": ["full"]},
    "standard-lora": {"method": "standard", "peft": [LORA]},
    "zero-shot": {"method": "prompt", "peft": [LORA], "steps": 0},
    "prompt-full": {"method": "prompt", "peft": ["full"]},
    "prompt-lora": {"method": "prompt", "peft": [LORA]},
    "prompt-ia3": {"method": "prompt", "peft": ["ia3"]},
    "prompt-adapter": {"method": "prompt", "peft": ["adapter"]},
    "prompt-bitfit": {"method": "prompt", "peft": ["bitfit"]},
    "pet": {"method": {"kind": "pet", **PET}, **PATTERNS},
    "ipet": {"method": {"kind": "ipet", **PET, "generations": 2, "grow": 2}, **PATTERNS},
    "lm-bff": {"method": {"kind": "lm-bff", "demonstrations": False}, "peft": [LORA]},
    "lm-bff-demonstrations": {"method": {"kind": "lm-bff", "demonstrations": True, "sets": 2}, "peft": [LORA]},
    "list": {
        "method": {"kind": "list", "sessions": 1, "student": {"steps": 60, "batch_size": 16}, "epochs": 10},
        "peft": ["adapter"],
    },
    "icl": {"method": {"kind": "icl"}, "max_length": 384},
    "icl-decoder": {"method": {"kind": "icl"}, "model": "stories260k", "max_length": 384},
    "t-few-decoder": {"method": {"kind": "t-few"}, "model": "stories260k"},
}
"""How each differs from the others; one pattern is used unless `patterns` says more. Demonstrations need length."""


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    """Rows of a split, gzipped or not; the NLI sets have no labelled test file, and are measured on validation."""
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            text = gzip.decompress(data) if name.endswith(".gz") else data
            return [json.loads(line) for line in text.decode().split("\n") if line]
    return rows(folder, "validation")


def written(path: Path, lines: list[dict[str, str]]) -> str:
    """The rows as a file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def prepared(task: str, data: Path, scratch: Path) -> dict[str, str]:
    """The task's training rows, and the test rows that are measured on."""
    folder = data / TASKS[task]["files"]
    test = sorted(rows(folder, "test"), key=lambda row: hashlib.sha256(json.dumps(row).encode()).hexdigest())
    return {
        "train": written(scratch / f"{task}-train.jsonl", rows(folder, "train")),
        "test": written(scratch / f"{task}-test.jsonl", test[: SETTINGS["test_rows"]]),
    }


def decoder(name: str, data: Path, scratch: Path) -> str:
    """A small real decoder, with a tokenizer, as transformers loads it."""
    if not (scratch / name).is_dir():
        spec = importlib.util.spec_from_file_location("tiny", ROOT / "examples" / "tiny_llama_tokenizer.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.convert(data / "weights" / name, scratch / name)
    return str(scratch / name)


def settings_of(task: str, system: str, shots: int, seed: int, files: dict[str, str]) -> dict[str, Any]:
    """One run's settings, but for its base and folder."""
    entry = dict(SYSTEMS[system])
    templates = TASKS[task]["templates"]
    if "model" in entry:  # what reads forwards answers at the end
        templates = [template for template in templates if template.rstrip(".").endswith("{mask}")]
    recipe = {"steps": entry.get("steps", SETTINGS["steps"]), "batch_size": SETTINGS["batch_size"]}
    for trained in entry.get("peft", []):
        recipe["learning_rate"] = RATES[trained if isinstance(trained, str) else trained["kind"]]
    return {
        **files,
        "method": entry["method"],
        "templates": templates[: entry.get("patterns", 1)],
        "verbalizer": TASKS[task]["verbalizer"],
        "shots": shots,
        "seeds": [seed],
        "peft": entry.get("peft"),
        "recipe": recipe,
        "dtype": SETTINGS["dtype"],
        "max_length": entry.get("max_length", SETTINGS["pair_length" if "premise" in templates[0] else "max_length"]),
        "unlabelled_rows": SETTINGS["unlabelled_rows"],
        "baseline": False,  # in-context learning is a system of its own here
    }


def measure(task: str, system: str, shots: int, seed: int, files: dict[str, str], base: str | None) -> dict[str, Any]:
    """One run: its test figures and what it cost; or why there cannot be one, in the run's own words."""
    key = {"system": system, "shots": shots, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(task, system, shots, seed, files)
        run = FewShotRun.from_settings({**settings, "model": base, "out": f"{folder}/run"})
        begun = time.process_time()
        try:
            (result,) = fewshot(run, say=lambda line: None).seeds
        except InlayError as error:
            return {**key, "refused": str(error).replace(folder, "")}
        seconds = time.process_time() - begun
    return {
        **key, "digest": result.split["digest"], **{name: round(value, 6) for name, value in result.test.items()},
        "flops": result.flops, "trainable_parameters": result.trainable_parameters, "adapters": result.adapters,
        "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    """Run what is not in the results yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that holds text_classification, nli and weights")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--shots", type=int, nargs="+", default=list(SHOTS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the splits")
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.table:
        if arguments.data is None:
            parser.error("--data is needed")
        with tempfile.TemporaryDirectory() as scratch:
            grid(arguments, Path(scratch))
    TABLE.parent.mkdir(exist_ok=True)
    runs = read(RESULTS)
    TABLE.write_text(page(runs, list(SYSTEMS), len(SEEDS)), encoding="utf-8")
    draw(runs, TABLE.with_suffix(".svg"))


def grid(arguments: argparse.Namespace, scratch: Path) -> None:
    """All the runs that are asked for and not there: split by split, so that a stopped grid is even."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS[: arguments.seeds]:
        for shots in arguments.shots:
            for task in arguments.tasks.split(","):
                files = prepared(task, arguments.data, scratch)
                for system in arguments.systems.split(","):
                    base = SYSTEMS[system].get("model")
                    source = None if base is None else decoder(base, arguments.data, scratch)
                    one(task, system, shots, seed, files, source)


def one(task: str, system: str, shots: int, seed: int, files: dict[str, str], base: str | None) -> None:
    """One run, unless it is there; written at once."""
    path = RESULTS / f"{task}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"settings": SETTINGS, "runs": []}
    if stored["settings"] != SETTINGS:
        raise SystemExit(f"{path} was made under other settings: move it away first")
    if any((run["system"], run["shots"], run["seed"]) == (system, shots, seed) for run in stored["runs"]):
        return
    stored["runs"].append(measure(task, system, shots, seed, files, base))
    print(task, json.dumps(stored["runs"][-1]), flush=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    main()
