"""`convert(folder, out)`: an adapter folder, checked, in the one format that Inlay and HF peft share."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from inlay.engine import checkpoint, files
from inlay.errors import CheckpointError, ConfigError
from inlay.tasks.loading import quiet
from inlay.tasks.task import Task
from inlay.train.files import staged
from inlay.train.record import TASK_FILE

PREFIX = "base_model.model."
AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""peft's task types, and the class that such an adapter's base is loaded with."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    out: str
    peft_type: str
    """What HF peft reads it as; "INLAY" when only Inlay can."""
    tensors: int
    renamed: int
    """Keys that lacked the prefix that both libraries expect."""


def convert(
    folder: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    quantise: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Check an adapter folder and write it anew, in safetensors, under the keys that Inlay and HF peft both read.

    With `model` (the base, a folder or a hub id) the adapter is set into it and saved again: shapes are then checked
    too, and what is written has the base's fingerprint. `quantise` ("int8", "nf4") then stores its matrices as
    codes, for Inlay only, and without it an adapter of codes becomes a plain one again. Raises CheckpointError for
    pickle files, damaged files, unknown kinds and leftovers; then nothing is written.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / files.CONFIG).is_file() and (folder / "adapter" / files.CONFIG).is_file():
        folder = folder / "adapter"
    if out.exists() and not overwrite and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already: choose another folder, or --overwrite to replace it")
    if quantise is not None and model is None:
        raise ConfigError(f"quantise={quantise!r} needs the base model, to write the adapter anew: add --model")
    config = files.read_config(folder)
    tensors, metadata = files.read_stored(folder)
    files.read_tensors(folder)  # that codes fit their scales
    checkpoint.read_methods(config, folder)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{folder / files.WEIGHTS}: {name} has values that are not finite; the adapter is damaged"
            )
    with staged(out, "writing the adapter to") as beside:
        if model is not None:
            base = _base(model, config, folder / TASK_FILE)
            checkpoint.load(base, folder)
            checkpoint.save(base, beside, quantise=quantise)
            for name in base_files(folder):
                shutil.copy(folder / name, beside / name)
            config, written = files.read_config(beside), files.read_tensors(beside)[0]
        else:
            written = _prefixed(tensors, config)
            extra = {files.EXTRA: files.read_tensors(folder, files.EXTRA)} if (folder / files.EXTRA).is_file() else {}
            files.write(beside, config, {files.WEIGHTS: (written, {"format": "pt", **metadata}), **extra})
    return Converted(
        str(out), str(config["peft_type"]), len(written), len(set(written) - set(tensors)) if model is None else 0
    )


def base_files(folder: Path) -> list[str]:
    """Files beside an adapter that belong to it: the task, which says what the head's rows mean."""
    return [name for name in (TASK_FILE,) if (folder / name).is_file()]


def _prefixed(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Files of models adapted in place lack the wrapper's prefix; prompts have no path and none either."""
    if config.get("peft_type") == "INLAY" or any(name.startswith("base_model.") for name in tensors):
        return tensors
    return {f"{PREFIX}{name}" if "." in name else name: tensor for name, tensor in tensors.items()}


def _base(model: str, config: dict[str, Any], task: Path) -> Any:
    """The base as the adapter's task has it, with as many labels; where it says no task, as its config has it."""
    if task.is_file():
        return Task.from_dict(json.loads(task.read_text(encoding="utf-8"))).load_model(model)
    kind = config.get("task_type") or (config.get("auto_mapping") or {}).get("base_model_class")
    fingerprint = checkpoint.own_entry(config).get("base") or {}
    loader = getattr(transformers, AUTO.get(str(kind), str(kind or fingerprint.get("class"))), transformers.AutoModel)
    try:
        with quiet():
            return loader.from_pretrained(model, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no base model can be loaded from {model}: {' '.join(str(error).split())[:200]}") from error
