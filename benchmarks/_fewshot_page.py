"""The page on few-shot systems, made from benchmarks/results/fewshot/ and from nothing else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t

Run = dict[str, Any]
QUESTIONS = {
    "A prompt instead of a new head": ("prompt-lora", "standard-lora"),
    "the same, all parameters trained": ("prompt-full", "standard-full"),
    "Unlabelled rows: PET": ("pet", "prompt-lora"),
    "Unlabelled rows: iPET": ("ipet", "prompt-lora"),
    "Unlabelled rows: LiST": ("list", "prompt-adapter"),
    "Demonstrations: LM-BFF": ("lm-bff-demonstrations", "lm-bff"),
    "Training at all": ("prompt-lora", "icl"),
}
"""What is asked, and whose accuracy less whose answers it."""


def read(results: Path) -> dict[str, list[Run]]:
    """Each task's runs."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))["runs"] for path in sorted(results.glob("*.json"))}


def page(runs: Mapping[str, Sequence[Run]], systems: Sequence[str], splits: int) -> str:
    """Differences within the splits first, then mean ± standard deviation by task, shots and system."""
    lines = [
        "# Few-shot systems, measured",
        "",
        "Written by `python benchmarks/fewshot.py --table` from `benchmarks/results/fewshot/*.json`. Accuracy in",
        "percent. The script says what was the same for all; nothing was tuned on the test rows.",
        "What the figures say: [benchmarks](../benchmarks.md#few-labels).",
        "",
        "![Accuracy by rows a class](few-shot.svg)",
        "",
        "## What they differ by",
        "",
        "Points of accuracy, the mean over the splits that both systems have been run on ± its standard error (the",
        f"number of splits in brackets where it is not {splits}). Bold: beyond what chance gives one such figure in",
        "twenty (Student's t, two-sided), so that a few of so many are bold by chance alone.",
        "",
        "| | rows a class | " + " | ".join(runs) + " |",
        "| --- | ---: |" + " ---: |" * len(runs),
    ]
    sizes = sorted({run["shots"] for found in runs.values() for run in found})
    for question, pair in QUESTIONS.items():
        named = f"{question} ({pair[0]} − {pair[1]})"
        for shots in [[size] for size in sizes] + [sizes]:
            cells = [_cell_of(difference(found, *pair, shots), splits) for found in runs.values()]
            lines.append("| " + " | ".join([named, "all" if shots == sizes else str(shots[0]), *cells]) + " |")
            named = ""
    lines += ["", "## All figures", "", "Mean ± standard deviation over the splits (their number in brackets where it"]
    lines += [f"is not {splits}). A dash: the system refused, and why is below the table."]
    for task, found in runs.items():
        lines += _table(task, found, systems, splits)
    return "\n".join(lines) + "\n"


def difference(runs: Sequence[Run], one: str, other: str, sizes: Sequence[int]) -> list[float]:
    """Points of accuracy of one system less the other's, for each split that both have; of several sizes the mean."""
    known = {
        (run["system"], run["seed"], run["shots"]): 100 * run["accuracy"]
        for run in runs
        if "refused" not in run and run["shots"] in sizes
    }
    by_split: dict[int, list[float]] = {}
    for (system, seed, shots), accuracy in known.items():
        if system == one and (other, seed, shots) in known:
            by_split.setdefault(seed, []).append(accuracy - known[other, seed, shots])
    return [statistics.fmean(points) for points in by_split.values()]


def _cell_of(points: Sequence[float], splits: int) -> str:
    """Mean ± standard error of some differences."""
    if not points:
        return ""
    mean, count = statistics.fmean(points), f" ({len(points)})" if len(points) != splits else ""
    if len(points) == 1:
        return f"{mean:+.1f}{count}"
    error = statistics.stdev(points) / len(points) ** 0.5
    sure = len(points) > 2 and abs(mean) > float(t.ppf(0.975, len(points) - 1)) * error
    shown = f"{mean:+.1f} ± {error:.1f}"
    return (f"**{shown}**" if sure else shown) + count


def _table(task: str, runs: Sequence[Run], systems: Sequence[str], splits: int) -> list[str]:
    """A task's table, a line for each system, and why systems refused."""
    shots = sorted({run["shots"] for run in runs})
    heads = ["System", *(f"{k} a class" for k in shots), "parameters", "MFLOPs an answer", "CPU s (most shots)"]
    lines = ["", f"### {task}", "", "| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(shots) + 3)]
    for system in systems:
        here = [run for run in runs if run["system"] == system]
        lines += [_line(system, shots, here, splits)] if here else []
    refused = dict.fromkeys((run["system"], run["shots"], run["refused"]) for run in runs if "refused" in run)
    return lines + ([""] if refused else []) + [f"- {system}, {k} a class: {why}" for system, k, why in refused]


def _line(system: str, shots: Sequence[int], runs: Sequence[Run], splits: int) -> str:
    done = [run for run in runs if "refused" not in run]
    cells = [_cell([run for run in runs if run["shots"] == k], splits) for k in shots]
    if not done:
        return f"| {system} | " + " | ".join([*cells, "", "", ""]) + " |"
    last = [run["cpu_seconds"] for run in done if run["shots"] == max(r["shots"] for r in done)]
    shown = f"{max(run['trainable_parameters'] for run in done):,}"
    shown += f" × {done[0]['adapters']}" if done[0]["adapters"] > 1 else ""
    flops = statistics.fmean(run["flops"] for run in done) / 1e6
    return f"| {system} | " + " | ".join([*cells, shown, f"{flops:,.0f}", f"{statistics.fmean(last):.0f}"]) + " |"


def _cell(runs: Sequence[Run], splits: int) -> str:
    values = [run["accuracy"] for run in runs if "refused" not in run]
    if not values:
        return "—" if runs else ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}" + (f" ({len(values)})" if len(values) != splits else "")
