"""What is done with a run's folder afterwards: evaluate, predict, merge."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.adapters import merge as merge_adapters
from inlay.engine.checkpoint import load
from inlay.engine.host import CHILD
from inlay.engine.replication import unshared
from inlay.errors import CheckpointError, ConfigError, DataError, did_you_mean
from inlay.tasks.data import read_splits
from inlay.tasks.loading import quiet
from inlay.tasks.task import Task
from inlay.train import loaded, several
from inlay.train.files import staged, write_text
from inlay.train.prepare import load_base, splits_of
from inlay.train.record import ADAPTER, RUN_FILE, TASK_FILE, measured
from inlay.train.run import Run

PROBE = (
    "The train to the coast leaves at seven.",
    "Nobody had told the cook that forty more guests were on their way, and there was no bread left.",
    "no",
    "What does it cost to send a parcel of two kilograms abroad?",
    "I have never been so glad to see rain.",
)
"""Sentences on which a merged model is compared with the one it came from."""

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest logit difference that rounding alone explains, in units of the largest logit (at least 1)."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A run's folder in memory: the base model with the adapter attached, and what is needed to feed it."""

    run: Run
    task: Any
    tokenizer: Any
    model: Any


def open_run(
    folder: str | Path, *, plain: bool = False, adapters: Mapping[str, str] | None = None, compose: Any = None
) -> Loaded:
    """Base model with adapter, task and tokenizer of a run. CheckpointError when the folder holds no whole run.

    `plain`: the base as it was saved, also where the run held it quantised. `adapters` and `compose` are those of a
    `Run`: more adapters of other runs, and another way to run them all.
    """
    folder = Path(folder)
    if folder.name == ADAPTER and not (folder / RUN_FILE).exists() and (folder.parent / RUN_FILE).exists():
        folder = folder.parent
    if not (folder / RUN_FILE).is_file() or not (folder / TASK_FILE).is_file():
        names = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        found = (
            "it does not exist" + did_you_mean(folder.name, names) if not folder.exists() else f"it has no {RUN_FILE}"
        )
        raise CheckpointError(
            f"{folder} is not the folder of a run ({found}); give the folder that `inlay train --out` made"
        )
    if not (folder / ADAPTER).is_dir():
        raise CheckpointError(f"the run in {folder} has not ended: go on with inlay train --resume --out {folder}")
    run = Run.from_yaml(folder / RUN_FILE)
    others = loaded.kept(run, folder)
    run, others = _composed(run, others, adapters or {}, compose)
    try:
        task: Any = Task.from_dict(json.loads((folder / TASK_FILE).read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{folder / TASK_FILE} is damaged: {error}") from error
    model: Any = load_base(task, run, "auto" if plain else run.load)
    loaded.load_others(model, others, task)
    load(model, folder / ADAPTER)
    loaded.arrange(model, run, None if compose is None else adapters or ())
    if torch.cuda.is_available():
        model.to("cuda")
    return Loaded(run, task, task.load_tokenizer(run.model), model.eval())


def _composed(
    run: Run, kept: Mapping[str, Path], adapters: Mapping[str, str], compose: Any
) -> tuple[Run, dict[str, Path]]:
    """The run with more adapters and another composition, and the folders of all its adapters."""
    if compose is None and not adapters:
        return run, dict(kept)
    if compose is None:
        names = ", ".join(adapters)
        raise ConfigError(f"nothing says how {names} should run: add --compose, as in --compose '[{names}, default]'")
    for name in adapters:
        if name in kept:
            raise ConfigError(f"the run has an adapter {name!r} already (of {run.adapters[name]}): choose another name")
    more = {name: loaded.folder_of(folder, f"adapters.{name}") for name, folder in adapters.items()}
    return run.replace(adapters={**run.adapters, **adapters}, compose=compose), {**kept, **more}


def rows_for(run: Run, data: Any, split: str | None = None, column: str | None = None) -> Any:
    """The rows to use: a file, a `datasets` object, a split of a folder or hub id; by default the run's test rows."""
    splits = read_splits(data) if data is not None else splits_of(run, column)
    if split is None:
        split = (
            "train"
            if data is not None and len(splits) == 1
            else next((s for s in ("test", "validation") if s in splits), None)
        )
    if split not in splits:
        raise DataError(
            f"no rows to use: there is no {split or 'test'} split among {', '.join(splits) or 'none'}; give --data FILE"
        )
    return splits[split]


def evaluate(
    folder: str | Path,
    data: Any = None,
    *,
    split: str | None = None,
    batch_size: int = 32,
    progress: bool = False,
    adapters: Mapping[str, str] | None = None,
    compose: Any = None,
    task_id: str | None = None,
    task_id_column: str | None = None,
) -> dict[str, float]:
    """The task's metrics of a run's adapter on `data` (a file, folder, hub id or `datasets` object).

    `adapters` and `compose`: with those of other runs, as in a `Run`. Of a method that learned several tasks,
    `task_id` names the task of all rows, `task_id_column` the column that says it. Raises CheckpointError for the
    folder, DataError for the rows.
    """
    opened = open_run(folder, adapters=adapters, compose=compose)
    rows = rows_for(opened.run, data, split, opened.task.task_id_column)
    task, rows = several.asked(opened.task, rows, task_id, task_id_column)
    found = task.evaluate(opened.model, opened.tokenizer, rows, batch_size=batch_size, progress=progress)
    return measured(found)


def predict(
    folder: str | Path,
    data: Any,
    out: str | Path | None = None,
    *,
    split: str | None = None,
    batch_size: int = 32,
    progress: bool = False,
    adapters: Mapping[str, str] | None = None,
    compose: Any = None,
    task_id: str | None = None,
    task_id_column: str | None = None,
) -> list[dict[str, Any]]:
    """A prediction for each row; also written to `out` (.jsonl, .json or .csv), beside its place and renamed.

    `adapters`, `compose`, `task_id` and `task_id_column` as in `evaluate`.
    """
    check_writable(out)
    opened = open_run(folder, adapters=adapters, compose=compose)
    rows = rows_for(opened.run, data, split, opened.task.task_id_column)
    task, rows = several.asked(opened.task, rows, task_id, task_id_column)
    found = task.predict(opened.model, opened.tokenizer, rows, batch_size=batch_size, progress=progress)
    predictions: list[dict[str, Any]] = [dict(row) for row in found]
    write_predictions(predictions, out)
    return predictions


def check_writable(out: str | Path | None) -> None:
    """Raise ConfigError for a file name by which nobody can tell how predictions are to be written."""
    if out is not None and Path(out).suffix not in _WRITERS:
        near = did_you_mean(Path(out).suffix, _WRITERS)
        raise ConfigError(f"--out {out}: predictions are written as {', '.join(_WRITERS)}{near}")


def write_predictions(predictions: list[dict[str, Any]], out: str | Path | None) -> None:
    """Write predictions as the file's name says (.jsonl, .json, .csv), if there is one."""
    if out is not None:
        write_text(out, _WRITERS[Path(out).suffix](predictions))


def _as_csv(rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: v if isinstance(v, str | int | float) else json.dumps(v, ensure_ascii=False) for k, v in row.items()}
        )
    return stream.getvalue()


_WRITERS = {
    ".jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    ".json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1) + "\n",
    ".csv": _as_csv,
}


@dataclasses.dataclass(frozen=True)
class Merged:
    """What came of a merge: where it is, and how far its logits are from those of the model with the adapter."""

    out: str
    largest_difference: float
    tolerance: float
    texts: int
    quantisation: float = 0.0
    """Mean difference of the logits from those of the quantised base that the adapter was trained on."""


def merge(folder: str | Path, out: str | Path, *, tolerance: float | None = None, overwrite: bool = False) -> Merged:
    """Fold a run's adapter into its base and write a plain transformers folder (weights, config, tokenizer).

    The folder is read back and its logits on a few sentences are compared with those of the model with the adapter
    attached. Raises CheckpointError when they differ by more than `tolerance` (then nothing is left behind),
    UnsupportedError when the method is no change of the weights, ConfigError when `out` is taken. A run on a quantised
    base is merged into the plain weights, which that base was made from; how far its logits move is in the result.
    """
    out = Path(out)
    if out.exists() and not overwrite and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already: choose another folder, or --overwrite to replace it")
    opened = open_run(folder, plain=True)
    model, tokenizer = opened.model, opened.tokenizer
    batch = _probe(opened)
    count = len(next(iter(batch.values())))
    before = _logits(model, batch)
    quantised = _logits(open_run(folder).model, batch) if opened.run.load != "auto" else before
    merge_adapters(model)
    if tolerance is None:
        tolerance = TOLERANCES.get(model.dtype, 1e-4) * max(1.0, before.abs().max().item())
    with staged(out, "writing the merged model to") as beside:
        plain = {name: tensor for name, tensor in model.state_dict().items() if CHILD not in name.split(".")}
        with quiet():
            model.save_pretrained(beside, state_dict=unshared(model, plain))
        tokenizer.save_pretrained(beside)
        again = opened.task.load_model(str(beside), dtype=model.dtype).to(model.device).eval()
        difference = (_logits(again, batch) - before).abs().max().item()
        if not difference <= tolerance:
            raise CheckpointError(
                f"the merged model is not the same: its logits differ by up to {difference:.3g} on {count} "
                f"{'sentences' if 'input_ids' in batch else 'examples'}, more than {tolerance:.3g}. Nothing was "
                "written. A base in half precision rounds more: "
                "merge it in float32 (dtype: float32 in run.yaml), or allow it with --tolerance"
            )
    return Merged(str(out), difference, tolerance, count, (quantised - before).abs().mean().item())


def _probe(opened: Loaded) -> dict[str, Tensor]:
    model, tokenizer = opened.model, opened.tokenizer
    batch = opened.task.probe(model, tokenizer)
    if batch is None:
        batch = dict(tokenizer(list(PROBE), padding=True, return_tensors="pt"))
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = batch["input_ids"]
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch).logits
    if "attention_mask" not in batch:
        return logits.float()
    mask = batch["attention_mask"].bool()
    if logits.dim() == 3 and logits.shape[:2] == mask.shape and "decoder_input_ids" not in batch:
        logits = logits[mask]  # what stands at padding is nobody's answer
    return logits.float()
