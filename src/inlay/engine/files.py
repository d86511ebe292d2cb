"""The two files of an adapter folder: read without trusting them, written so that nothing is ever half there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inlay.errors import CheckpointError, nearest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
EXTRA = "adapter_extra.safetensors"
"""What HF peft's format has no room for (the encoder behind a prompt, starting factors): read by Inlay only."""
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_adapter.bin")
LARGEST_CONFIG = 16 * 2**20


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` as a dict. Raises CheckpointError when it is missing, no JSON object, or absurdly large."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(_missing(folder))
    if path.stat().st_size > LARGEST_CONFIG:
        raise CheckpointError(f"{path} is {path.stat().st_size:,} bytes, which no adapter config needs: wrong or damaged file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): the file is damaged, restore it or save again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a JSON {type(config).__name__}, not an object: not an adapter config")
    return config


def _missing(folder: Path) -> str:
    if not folder.exists():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        close = nearest(folder.name, siblings)
        return f"there is no folder {folder}" + (f"; near it: {', '.join(close)}" if close else "")
    inside = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
    hint = f"; its subfolder {folder / 'adapter'} looks like the one" if (folder / "adapter" / CONFIG).is_file() else ""
    return f"{folder} has no {CONFIG} (it holds: {', '.join(inside) or 'nothing'}){hint}"


def read_tensors(folder: Path, name: str = WEIGHTS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata. Pickle files are refused, whatever they hold."""
    path = folder / name
    if not path.is_file():
        for pickle in PICKLES:
            if (folder / pickle).exists():
                raise CheckpointError(
                    f"{folder} holds only {pickle}, a pickle file, which can run code when it is read and is refused: "
                    f"have its author save it as {WEIGHTS}"
                )
        raise CheckpointError(f"{folder} has no {name}: the adapter is incomplete")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is truncated or damaged, copy or save it again") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when it does not."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"the disk is full: could not write {path}; what was there before is untouched") from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(folder: Path, config: Mapping[str, Any], files: Mapping[str, tuple[dict[str, Tensor], dict[str, str]]]) -> None:
    """Write all files beside their places, then rename them, the config last: a reader finds the old or the new."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # Renames happen when the stack unwinds, last entered first, so the config is entered first.
        temporary = stack.enter_context(replacing(folder / CONFIG))
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, (tensors, metadata) in files.items():
            temporary = stack.enter_context(replacing(folder / name))
            try:
                save_file(tensors, temporary, metadata=metadata)
            except SafetensorError as error:
                raise _disk_error(folder / name, error) from error
    for name in (EXTRA,):
        if name not in files:
            (folder / name).unlink(missing_ok=True)


def _disk_error(path: Path, error: SafetensorError) -> Exception:
    """safetensors reports a full disk as its own error; everything else about writing is one too."""
    reason = "the disk is full" if "No space left" in str(error) or "os error 28" in str(error) else str(error)
    return CheckpointError(f"could not write {path}: {reason}; what was there before is untouched")
