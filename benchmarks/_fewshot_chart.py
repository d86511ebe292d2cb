"""docs/benchmarks/few-shot.svg: accuracy by labelled rows a class, a panel for each task."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

mpl.rcParams |= {"svg.hashsalt": "inlay", "svg.fonttype": "none"}  # the same file each time, with text as text
SHOWN = {
    "standard-lora": ("LoRA, new head", "#9a9a9a", "o"),
    "prompt-lora": ("LoRA, prompt", "#3b6ea5", "s"),
    "pet": ("PET", "#c2571a", "^"),
    "ipet": ("iPET", "#7a3b8f", "v"),
    "list": ("LiST", "#3f8f4f", "D"),
}
COLUMNS = 4


def draw(runs: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Means over the splits, with bars of one standard deviation."""
    rows = -(-len(runs) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.9 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for panel, (task, found) in zip(panels, runs.items(), strict=False):
        for place, (system, (name, color, marker)) in enumerate(SHOWN.items()):
            by_shots: dict[int, list[float]] = {}
            for run in found:
                if run["system"] == system and "refused" not in run:
                    by_shots.setdefault(run["shots"], []).append(100 * run["accuracy"])
            points = sorted(by_shots.items())
            panel.errorbar(
                [shots * 1.03 ** (place - 2) for shots, _ in points],  # side by side, not one upon the other
                [statistics.fmean(values) for _, values in points],
                [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points],
                color=color, marker=marker, markersize=4, linewidth=1.2, elinewidth=0.7, capsize=2, label=name,
            )  # fmt: skip
        panel.set_title(task, fontsize=10)
        panel.set_xscale("log", base=2)
        sizes = sorted({run["shots"] for run in found})
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.tick_params(labelsize=8)
    for panel in panels[len(runs) :]:
        panel.axis("off")
    figure.supxlabel("labelled rows a class", fontsize=10)
    figure.supylabel("accuracy, %", fontsize=10)
    if runs:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(SHOWN), fontsize=9)
    figure.savefig(path, metadata={"Date": None})
