"""Which learning rate goes with what is trained, before `benchmarks/fewshot.py` compares: chosen on another set.

    python benchmarks/fewshot_rates.py --data ../shared/data

English MasakhaNEWS is not in that comparison, and its validation rows are read here, never its test rows: 16 rows a
class, two splits, everything else as there. Writes benchmarks/results/fewshot_rates.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import fewshot
import torch

RESULTS = fewshot.ROOT / "benchmarks" / "results" / "fewshot_rates.json"
SET, SHOTS, SPLITS, ROWS = "masakhanews_eng", 16, fewshot.SEEDS[:2], 300
TRIED = {
    "full": (3e-5, 1e-4, 2e-4, 5e-4),
    "lora": (5e-4, 1e-3, 2e-3, 4e-3),
    "ia3": (3e-3, 1e-2, 3e-2, 1e-1),
    "adapter": (3e-4, 1e-3, 3e-3, 1e-2),
    "bitfit": (1e-3, 3e-3, 1e-2, 3e-2),
}
SYSTEMS = {kind: [name for name in ("standard-" + kind, "prompt-" + kind) if name in fewshot.SYSTEMS] for kind in TRIED}


def main() -> None:
    """Every rate for each kind; the table that the comparison's RATES were read from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds text_classification")
    data = parser.parse_args().data
    torch.set_num_threads(1)
    sibling = fewshot.TASKS["masakhanews_hau"]
    words = {name: word for name, word in sibling["verbalizer"].items() if name != "religion"}  # no such label here
    fewshot.TASKS[SET] = {**sibling, "files": f"text_classification/{SET}", "verbalizer": words}
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        files = fewshot.prepared(SET, data, Path(scratch))
        measured = fewshot.rows(data / "text_classification" / SET, "validation")[:ROWS]
        files["test"] = fewshot.written(Path(scratch) / "validation.jsonl", measured)
        for kind, rates in TRIED.items():
            for rate in rates:
                fewshot.RATES[kind] = rate
                for system in SYSTEMS[kind]:
                    runs = [fewshot.measure(SET, system, SHOTS, seed, files, None) for seed in SPLITS]
                    scores = [run["accuracy"] for run in runs]
                    found.append(
                        {"system": system, "rate": rate, "validation": scores, "mean": statistics.fmean(scores)}
                    )
                    print(json.dumps(found[-1]), flush=True)
    settings = {**fewshot.SETTINGS, "set": SET, "rows": len(measured), "shots": SHOTS, "splits": SPLITS}
    RESULTS.write_text(json.dumps({"settings": settings, "runs": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
