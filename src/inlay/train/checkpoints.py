"""The checkpoints of a run: `checkpoints/checkpoint-<step>` to go on from, and `checkpoints/best` to keep.

Each is written beside and renamed, and says itself what it holds, so that one cut short by a crash is never taken for
whole. A checkpoint has the adapter (with its heads), the optimiser, the schedule, the random states and the methods'
controllers; never the base model.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from inlay.errors import TrainingError
from inlay.train.files import is_complete

STATE_FILE = "inlay_state.pt"
"""What transformers' own checkpoint files do not hold: the controllers' states and the seconds already spent."""


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = {}
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and is_complete(path):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The optimiser steps behind a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint. Raises TrainingError when there is none."""
    recover(folder)
    found = checkpoints(folder)
    if not found:
        raise TrainingError(
            f"there is no complete checkpoint in {folder} to resume from; start the run anew without --resume "
            "(and with --overwrite if the folder holds anything)"
        )
    return found[-1]


def recover(folder: Path) -> None:
    """Tidy up after a crash in the middle of a save: what is whole takes its place, what is torn goes."""
    for kind in ("part", "old"):  # a whole new one goes before the one that it was to replace
        for path in folder.glob(f".*.{kind}") if folder.is_dir() else ():
            place = folder / path.name[1 : -len(kind) - 1]
            if path.is_dir() and not place.exists() and is_complete(path):
                os.replace(path, place)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def keep_last(folder: Path, count: int) -> None:
    """Delete all but the newest `count` checkpoints."""
    for path in checkpoints(folder)[:-count]:
        shutil.rmtree(path, ignore_errors=True)
