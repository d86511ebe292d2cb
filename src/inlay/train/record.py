"""What a run leaves behind besides its adapter: `record.json`, and a model card that a person can read."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from inlay.errors import CheckpointError
from inlay.train.files import write_json
from inlay.train.run import Run

RUN_FILE, TASK_FILE, CURVE_FILE, CHART_FILE = "run.yaml", "task.json", "metrics.jsonl", "loss.svg"
RECORD_FILE, CARD_FILE, ADAPTER, CHECKPOINTS = "record.json", "README.md", "adapter", "checkpoints"
OTHERS = "adapters"
"""Copies of the adapters of other runs that a run was made on."""
LEFT_BY_A_RUN = (RUN_FILE, TASK_FILE, CURVE_FILE, CHART_FILE, RECORD_FILE, CARD_FILE, ADAPTER, CHECKPOINTS, OTHERS)
"""Everything in a run's folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The result of a run, as `record.json` holds it."""

    method: Any
    """The method's kind and fields, or a list of them."""
    model: str
    """The base model's folder or hub id."""
    task: Mapping[str, Any]
    """The task with its options, columns and labels."""
    metrics: Mapping[str, Mapping[str, float]]
    """Metrics of the saved adapter by split: "validation" and "test", those that there are."""
    primary_metric: str
    """The metric that chose the best checkpoint."""
    trainable_parameters: int
    """Parameters that the optimiser changed."""
    total_parameters: int
    """Those and the frozen ones."""
    adapter_bytes: int
    """Of the adapter's safetensors files."""
    seconds: float
    """Wall-clock time of training and its evaluations; the parts of a resumed run are added up."""
    peak_memory_bytes: int
    """Of the GPU where there is one, otherwise of the process."""
    steps: int
    """Optimiser steps made."""
    best_step: int
    """The step that the saved adapter is from."""
    rows: Mapping[str, int]
    """Rows by split."""
    seed: int
    """Of initialisation, order and dropout."""
    device: str
    """What it ran on."""
    versions: Mapping[str, str]
    """Of Inlay, Python and the libraries underneath."""
    out: str
    """The run's folder."""

    def write(self) -> Path:
        """Write `record.json` into the run's folder."""
        return write_json(Path(self.out) / RECORD_FILE, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: str | Path) -> Record:
        """The record in a run's folder. Raises CheckpointError when there is none or it is damaged."""
        path = Path(folder) / RECORD_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} has no {RECORD_FILE}: not a run's folder, or the run has not ended"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r})") from error


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for library in ("inlay", "torch", "transformers", "accelerate", "datasets", "safetensors"):
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed as a package"
    return found


def peak_memory_bytes() -> int:
    """The most memory held so far: on the GPU if it was used, otherwise by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """`cpu (8 threads)`, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def duration(seconds: float) -> str:
    """`42s`, `3m10s`, `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def measured(figures: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among a task's metrics."""
    return {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}


def _in_python(out: str, run: Run) -> str:
    """The calls that set a run's adapters into a model."""
    calls = [f"inlay.load(model, {f'{out}/{OTHERS}/{name}'!r}, name={name!r})" for name in run.adapters]
    calls.append(f"inlay.load(model, {f'{out}/{ADAPTER}'!r})")
    if run.adapters or run.compose is not None:
        from inlay.combining.trees import whole

        calls.append(f"inlay.activate(model, {whole(run.compose)!r})")
    return ", ".join(f"`{call}`" for call in calls)


def model_card(record: Record, run: Run, summary: str) -> str:
    """The `README.md` of a run's folder, with the front matter that the hub reads."""
    kinds = " + ".join(str(method["kind"]) for method in run.method)
    splits = [split for split in ("validation", "test") if split in record.metrics]
    names = list(dict.fromkeys(name for split in splits for name in record.metrics[split]))
    table = ["| metric | " + " | ".join(splits) + " |", "| --- |" + " ---: |" * len(splits)]
    for name in names:
        cells = (record.metrics[split].get(name) for split in splits)
        table.append(f"| {name} | " + " | ".join("" if cell is None else f"{cell:.4f}" for cell in cells) + " |")
    share = record.trainable_parameters / max(record.total_parameters, 1)
    base = json.dumps(record.model)
    return "\n".join([
        "---",
        f"base_model: {base}",
        "library_name: inlay",
        f"tags: [inlay, {', '.join(str(method['kind']) for method in run.method)}]",
        "---",
        "",
        f"# {kinds} on {Path(record.model).name} for {record.task['kind']}",
        "",
        *(table if splits else ["No validation or test rows were given, so nothing was measured."]),
        "",
        f"- {record.trainable_parameters:,} of {record.total_parameters:,} parameters trained ({share:.2%}); "
        f"the adapter takes {record.adapter_bytes:,} bytes.",
        f"- {record.steps} optimiser steps in {duration(record.seconds)} on {record.device}; the adapter is that of "
        f"step {record.best_step}; seed {record.seed}.",
        "",
        "```",
        summary,
        "```",
        "",
        "![training loss and validation metric](loss.svg)",
        "",
        "## Use it",
        "",
        "```",
        f"inlay evaluate {record.out} --data FILE",
        f"inlay predict {record.out} --data FILE --out predictions.jsonl",
        f"inlay merge {record.out} --out FOLDER      # a plain transformers model",
        "```",
        "",
        f"or from Python, on a base model that you loaded yourself: {_in_python(record.out, run)}.",
        "",
        "## How it was made",
        "",
        "`run.yaml`, from which `inlay train run.yaml` makes it again:",
        "",
        "```yaml",
        run.to_yaml().rstrip(),
        "```",
        "",
    ])  # fmt: skip
