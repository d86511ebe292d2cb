"""The two files of an adapter folder: read without trusting them, written so that nothing is ever half there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from inlay.engine import codes
from inlay.engine.tensor_file import write_tensors
from inlay.errors import CheckpointError, nearest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
EXTRA = "adapter_extra.safetensors"
"""What HF peft's format has no room for (the encoder behind a prompt, starting factors): read by Inlay only."""
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_adapter.bin")
LARGEST_CONFIG = 16 * 2**20
SAVING, SAVED = ".inlay-saving-", ".inlay-saved"
"""Folders inside an adapter folder: files being written (a prefix), and a complete set about to be moved into place."""


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` as a dict. Raises CheckpointError when it is missing, no JSON object, or absurdly large."""
    path = locate(folder, CONFIG)
    if not path.is_file():
        raise CheckpointError(_missing(folder))
    if path.stat().st_size > LARGEST_CONFIG:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, which no adapter config needs: it is none")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): it is damaged, restore it or save again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a JSON {type(config).__name__}, not an object: not an adapter config")
    return config


def _missing(folder: Path) -> str:
    if not folder.exists():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        close = nearest(folder.name, siblings)
        return f"there is no folder {folder}" + (f"; near it: {', '.join(close)}" if close else "")
    if not folder.is_dir():
        return f"{folder} is a file; an adapter is a folder with {CONFIG} and {WEIGHTS}"
    inside = sorted(p.name for p in folder.iterdir())[:8]
    below = [name for name in inside if (folder / name / CONFIG).is_file()]
    hint = f"; its subfolder {folder / below[0]} looks like the one" if below else ""
    return f"{folder} has no {CONFIG} (it holds: {', '.join(inside) or 'nothing'}){hint}"


def locate(folder: Path, name: str) -> Path:
    """Where a file of an adapter is: in the folder, or still among those a save that was killed had completed."""
    saved = folder / SAVED / name
    return saved if saved.is_file() else folder / name


def read_tensors(folder: Path, name: str = WEIGHTS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors, those that are codes decoded, and its metadata. Pickle files are refused."""
    tensors, metadata = read_stored(folder, name)
    decoded = codes.plain(tensors, metadata, locate(folder, name))
    return decoded, {key: value for key, value in metadata.items() if key != codes.ENTRY}


def read_stored(folder: Path, name: str = WEIGHTS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same as they are stored: codes and their scales are tensors of their own."""
    path = locate(folder, name)
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
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is truncated or damaged, copy or save it again"
        ) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when it does not."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"the disk is full: {path} could not be written; what was there is intact") from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


Contents = Mapping[str, tuple[dict[str, Tensor], dict[str, str]]]
"""By file name, the tensors and metadata of safetensors files."""


def write(folder: Path, config: Mapping[str, Any], files: Contents) -> None:
    """Write all files of an adapter, or none: at whatever moment this is killed, a reader finds the old or the new.

    They are written into a folder beside their places; renaming that folder is what makes the new ones count, and
    `locate` finds them there until they are in place.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    saving: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        _sweep(folder)
        saving = Path(tempfile.mkdtemp(prefix=SAVING, dir=folder))
        for name, (tensors, metadata) in files.items():
            write_tensors(saving / name, tensors, metadata)
        (saving / CONFIG).write_text(text, encoding="utf-8")
        for path in saving.iterdir():
            _flush(path)
        os.replace(saving, folder / SAVED)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full: free some space" if full else str(error)
        raise CheckpointError(f"could not write {folder}; what was there before is untouched ({reason})") from error
    finally:
        if saving is not None:
            shutil.rmtree(saving, ignore_errors=True)
    _settle(folder)


def _settle(folder: Path) -> None:
    """Move a complete set of files into place; again, where an earlier save was killed doing so."""
    saved = folder / SAVED
    if not saved.is_dir() or saved.is_symlink():
        return
    if (saved / WEIGHTS).is_file() and not (saved / EXTRA).is_file():
        (folder / EXTRA).unlink(missing_ok=True)
    for path in sorted(saved.iterdir(), reverse=True):  # the extra file may go last: it is read only where it belongs
        os.replace(path, folder / path.name)
    saved.rmdir()


def _sweep(folder: Path) -> None:
    """Remove what saves that were killed left behind; a young one may be another process's, still at work."""
    for path in folder.glob(f"{SAVING}*"):
        if time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    """Onto the disk, so that a full one is noticed now and a power cut finds whole files."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
