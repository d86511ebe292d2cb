"""Stages of a few-shot run: each is done once and kept; a run that was stopped goes on behind the last one done.

A stage is whole or not there: it is made in a folder beside its place and renamed. Its name says what it is
("pattern-0/seed-1"), and what it depends on is kept with it, so that a changed run does not take an old one for its
own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from inlay.errors import CheckpointError
from inlay.fewshot.progress import Watch, unwatched
from inlay.train.files import is_complete, staged, write_json

NOTE = "stage.json"


class Stages:
    """Finished stages in a folder. `say` is told of each as it begins, `watch` of the steps of one that trains."""

    def __init__(
        self, folder: str | Path, say: Callable[[str], None] = lambda line: None, watch: Watch = unwatched
    ) -> None:
        self.folder, self.say, self.watch = Path(folder), say, watch

    def within(self, name: str) -> Stages:
        """Stages of a part of the run, in a folder of their own."""
        return Stages(
            self.folder / name,
            lambda line: self.say(f"{name}: {line}"),
            lambda stage, steps: self.watch(f"{name}: {stage}", steps),
        )

    def once(self, name: str, make: Callable[[Path], Mapping[str, Any] | None], **depends: Any) -> dict[str, Any]:
        """Let `make` fill the stage's folder, unless it has been done; its note (what `make` returned, and seconds).

        Raises CheckpointError when the stage that is there was made under other settings.
        """
        place = self.folder / name
        meant = json.loads(json.dumps(depends, default=str))
        if is_complete(place):
            note: dict[str, Any] = json.loads((place / NOTE).read_text(encoding="utf-8"))
            if note["depends"] != meant:
                then = note["depends"]
                changed = sorted(key for key in {**then, **meant} if then.get(key) != meant.get(key))
                raise CheckpointError(
                    f"{place} was made with another {', '.join(changed) or 'setting'}: start the run anew with "
                    "--overwrite, or give it another --out"
                )
            return note
        self.say(name)
        begun = time.monotonic()
        with staged(place, f"finishing {name} in", marker=True) as folder:
            found = dict(make(folder) or {})
            note = {**found, "depends": meant, "seconds": round(time.monotonic() - begun, 3)}
            write_json(folder / NOTE, note)
        return note

    def tensor(self, name: str, make: Callable[[], Tensor], **depends: Any) -> Tensor:
        """A tensor that is computed once."""

        def fill(folder: Path) -> None:
            save_file({"tensor": make().contiguous()}, folder / "tensor.safetensors")

        self.once(name, fill, **depends)
        return load_file(self.folder / name / "tensor.safetensors")["tensor"]

    def notes(self) -> dict[str, dict[str, Any]]:
        """The notes of all finished stages, by name."""
        found = {}
        for path in sorted(self.folder.rglob(NOTE)):
            if is_complete(path.parent):
                found[path.parent.relative_to(self.folder).as_posix()] = json.loads(path.read_text(encoding="utf-8"))
        return found
