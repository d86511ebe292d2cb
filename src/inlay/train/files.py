"""Files and folders that are either whole or not there: written beside, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inlay.engine.files import replacing
from inlay.errors import TrainingError

MARKER = "complete.json"
"""Written last into a folder: the size of every other file in it."""


@contextlib.contextmanager
def disk_full(doing: str) -> Iterator[None]:
    """Turn "no space left" into one sentence. torch and safetensors hide the errno in the text of their own errors."""
    try:
        yield
    except Exception as error:
        if _is_full(error):
            raise TrainingError(
                f"the disk is full while {doing}; what was there before is intact. Free some space and run again with "
                "--resume"
            ) from error
        raise


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, comes from a device with no space left."""
    if error is None:
        return False
    # torch's archive writer only notices that the file is shorter than what it wrote: "unexpected pos".
    signs = ("No space left", "os error 28", "inline_container.cc")
    known = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(sign in str(error) for sign in signs)
    return known or _is_full(error.__cause__ or error.__context__)


def write_text(path: str | Path, text: str) -> Path:
    """Write a whole file, or leave the old one as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_full(f"writing {path}"), replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path


def write_json(path: str | Path, content: Any) -> Path:
    """The same for JSON."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def staged(folder: str | Path, doing: str = "saving", *, marker: bool = False) -> Iterator[Path]:
    """A fresh folder to write into, which takes the place of `folder` when the block ends well, and vanishes otherwise.

    With `marker`, a file with the sizes of all others goes in last, so that a folder cut short can be told from a whole
    one wherever it came from (see `is_complete`).
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    with disk_full(f"{doing} {folder}"):
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            yield beside
            _settle(beside, marker)
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(folder, old)
            os.replace(beside, folder)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _settle(folder: Path, marker: bool) -> None:
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    if marker:
        write_json(folder / MARKER, sizes)


def is_complete(folder: str | Path) -> bool:
    """Whether a staged folder is all there: its marker, and every file at the size that the marker says."""
    folder = Path(folder)
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def folder_bytes(folder: str | Path, pattern: str = "*.safetensors") -> int:
    """Bytes of the files in a folder that match a pattern."""
    return sum(path.stat().st_size for path in Path(folder).glob(pattern))
