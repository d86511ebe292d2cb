"""The other adapters of a run in its model: loaded and frozen, composed with its own, and kept with the run.

A run keeps whole copies of them, `adapters/<name>` in its folder: adapters are small, and so the result depends on
nothing that may be moved or trained on later. `sources.json` beside them says where each came from, with a digest, so
that a copy that is not what the run was trained on is an error.

Heads that were trained for another task are left out: what an adapter knows of the language lies below them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from inlay.combining.composition import Average, BatchSplit, Fuse, Parallel, Part, Split
from inlay.combining.trees import OWN, composed, names_of, parts_of, whole
from inlay.engine import adapters as engine
from inlay.engine import checkpoint, files
from inlay.engine.fingerprint import compare
from inlay.engine.roles import new_heads
from inlay.engine.sites import SiteIndex
from inlay.engine.trained_copy import ModulesToSave
from inlay.errors import CheckpointError, ConfigError, InlayError, did_you_mean
from inlay.pieces.prompts.saved import adapter_folder
from inlay.train.files import staged, write_json
from inlay.train.record import OTHERS, RUN_FILE, TASK_FILE
from inlay.train.run import Run

SOURCES = "sources.json"
KEPT = (files.CONFIG, files.WEIGHTS, files.EXTRA, TASK_FILE)
"""The files of an adapter."""
BRANCHES = (Average, BatchSplit, Parallel, Split)
"""Compositions whose parts run apart, so that each needs a head."""


# -- folders -----------------------------------------------------------------------------------------------------------


def sources(run: Run) -> dict[str, Path]:
    """The adapters' own folders. ConfigError for one that is missing, or that the run would write over."""
    found = {name: folder_of(folder, f"adapters.{name}") for name, folder in run.adapters.items()}
    for name, folder in found.items():
        if folder.resolve().is_relative_to(Path(run.out).resolve()):
            raise ConfigError(
                f"adapters.{name}: {folder} lies in {run.out}, which the run writes: choose another --out"
            )
    return found


def folder_of(place: str | Path, what: str) -> Path:
    """The folder of an adapter, or of a run's. ConfigError when there is none."""
    place = Path(place).expanduser()
    folder = adapter_folder(place)
    if (folder / files.CONFIG).is_file():
        return folder
    if not place.is_dir():
        near = did_you_mean(place.name, (one.name for one in place.parent.iterdir())) if place.parent.is_dir() else ""
        raise ConfigError(f"{what}: there is no folder {place}{near}")
    begun = (place / "run.yaml").is_file()
    why = f"that run has not ended (inlay train --resume --out {place})" if begun else f"it has no {files.CONFIG}"
    raise ConfigError(f"{what}: {place} holds no adapter: {why}")


def keep(run: Run, folders: Mapping[str, Path]) -> None:
    """Copy the adapters into the run's folder."""
    if not folders:
        return
    with staged(Path(run.out) / OTHERS, "keeping the adapters in") as beside:
        for name, folder in folders.items():
            (beside / name).mkdir()
            for file in KEPT:
                if (folder / file).is_file():
                    shutil.copyfile(folder / file, beside / name / file)
        said = {name: {"from": run.adapters[name], "sha256": digest(beside / name)} for name in folders}
        write_json(beside / SOURCES, said)


def kept(run: Run, out: Path) -> dict[str, Path]:
    """The copies in a run's folder. CheckpointError for one that is not what was kept."""
    if not run.adapters:
        return {}
    try:
        said = json.loads((out / OTHERS / SOURCES).read_text(encoding="utf-8"))
        there = {name: str(said[name]["sha256"]) for name in run.adapters}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{out / OTHERS / SOURCES} is missing or damaged: restore it, or train again") from error
    for name, expected in there.items():
        folder = out / OTHERS / name
        if not folder.is_dir() or digest(folder) != expected:
            raise CheckpointError(
                f"{folder} {'has changed' if folder.is_dir() else 'is missing'}: the run was trained over the adapter "
                f"{name!r} as {run.adapters[name]} had it then; restore the copy, or train again"
            )
    return {name: out / OTHERS / name for name in run.adapters}


def digest(folder: Path) -> str:
    """Of an adapter's files."""
    found = hashlib.sha256()
    for file in KEPT:
        if (folder / file).is_file():
            found.update(f"{file} {(folder / file).stat().st_size}\n".encode())
            found.update((folder / file).read_bytes())
    return found.hexdigest()


def advice(folders: Mapping[str, Path]) -> list[str]:
    """A line for each adapter that was itself trained on top of others, which it needs to run as it did."""
    lines = []
    for name, folder in folders.items():
        if (folder.parent / RUN_FILE).is_file() and (
            tree := Run.from_yaml(folder.parent / RUN_FILE).compose
        ) is not None:
            lines.append(f"adapters.{name} was trained with compose: {tree!r}; by itself it is another adapter")
    return lines


# -- in the model ------------------------------------------------------------------------------------------------------


def load_others(model: Any, folders: Mapping[str, Path], task: Any) -> None:
    """Load adapters in order, frozen and inactive. Raises as `inlay.load` does, naming the adapter."""
    for name, folder in folders.items():
        try:
            load_frozen(model, folder, name, heads=same_labels(folder, task))
        except InlayError as error:
            raise type(error)(f"adapters.{name} ({folder}): {error}") from error
    if folders:
        engine.activate(model)


def load_frozen(model: Any, folder: Path, name: str, *, heads: bool) -> None:
    """One adapter, for good: nothing of it trains, and its controllers take no part. Without `heads`, no new heads."""
    index = SiteIndex(engine.base_model(model))
    with checkpoint.blaming(folder):
        file = checkpoint.read(folder, index, strict=heads)
        if not heads:
            file = without_heads(file, index.model)
        adapter = checkpoint.make(engine.set_in, index, file, name)
        try:
            checkpoint.fill(index, adapter, file)
        except BaseException:
            engine.detach(model, name)
            raise
    adapter.controllers.clear()
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)


def without_heads(file: checkpoint.File, model: nn.Module) -> checkpoint.File:
    """The file without modules that are heads here, or that this model has not. BaseModelError for another trunk."""
    heads = {*new_heads(model), *fresh_modules(model)}
    dropped = [name for name in file.saved if _is_head(name, model, heads)]
    own = checkpoint.own_entry(file.config)
    if base := own.get("base"):
        here = dict(model.named_parameters())
        inside = {name: facts for name, facts in base["weights"].items() if not _within(name, heads) and name in here}
        compare({**base, "shapes": None, "weights": inside}, model)
    plain = file.config.get("peft_type") != "INLAY"
    kinds = [entry["kind"] for entry in own.get("methods", ())]
    number = kinds.index(ModulesToSave.kind) if ModulesToSave.kind in kinds else -1

    def goes(key: str) -> bool:
        mine = plain or key.startswith(f"{number}.")
        return mine and any(f".{name}." in f".{key}" for name in dropped)

    tensors = {key: tensor for key, tensor in file.tensors.items() if not goes(key)}
    return file._replace(saved=tuple(name for name in file.saved if name not in dropped), tensors=tensors)


def fresh_modules(model: Any) -> set[str]:
    """Paths of the modules that the base's files have no weights for."""
    return {name.rpartition(".")[0] for name in getattr(model, "fresh_parameters", ())}


def _is_head(name: str, model: nn.Module, heads: set[str]) -> bool:
    matched = [path for path, _ in model.named_modules() if f".{name}." in f".{path}."]
    return not matched or all(_within(path, heads) or any(_within(head, {path}) for head in heads) for path in matched)


def _within(path: str, modules: set[str]) -> bool:
    return any(f"{path}.".startswith(f"{module}.") for module in modules)


def same_labels(folder: Path, task: Any) -> bool:
    """Whether an adapter's heads answer what this task asks: the same kind of task with the same labels."""
    try:
        there = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    here = task.to_dict()
    return all(there.get(fact) == here.get(fact) for fact in ("kind", "labels", "problem_type"))


# -- composed ----------------------------------------------------------------------------------------------------------


def beneath(model: nn.Module, run: Run) -> None:
    """Activate what runs below the run's own adapter, which is not attached yet."""
    part = composed(run.compose)
    if part is not None and OWN not in names_of(part):
        engine.activate(model, part)


def arrange(model: Any, run: Run, needed: Collection[str] | None = None) -> None:
    """Activate the run's adapters as it composes them. ConfigError where a part has no head, or an adapter (of the
    `needed`; all) is not used.
    """
    if not run.adapters and run.compose is None:
        return
    part, adapters = whole(run.compose), engine.adapters_of(model)
    used = set(names_of(part))
    for adapter in [adapters.get(name) for name in used]:
        used |= {name for method in adapter.methods for name in getattr(method, "running", ())}
    idle = [name for name in (run.adapters if needed is None else needed) if name not in used]
    if idle:
        raise ConfigError(
            f"the adapter {idle[0]!r} is loaded and nothing uses it: name it in compose, or leave it out of adapters"
        )
    engine.activate(model, part)
    lacking = fresh_modules(model) - _headed(part, adapters)
    if lacking:
        raise ConfigError(
            f"compose: {part!r} runs {', '.join(sorted(lacking))} with random numbers in some part: adapters of "
            f"other labels than the run's bring no head. Put {OWN!r} around the rest, as in "
            f"{{stack: [{next(iter(run.adapters), OWN)}, {OWN}]}}, or compose adapters of the same labels"
        )


def _headed(part: Part, adapters: engine.Adapters) -> set[str]:
    """Modules that are trained copies whichever way the model is run."""
    if part is None:
        return set()
    if isinstance(part, Fuse):
        part = next(one for one in part.bind(adapters) if isinstance(one, str))
    if isinstance(part, str):
        return {site.path for site, piece in adapters.get(part).pieces() if piece.replaces}
    inside = [_headed(one, adapters) for one in parts_of(part)]
    return set.intersection(*inside) if isinstance(part, BRANCHES) else set.union(*inside)


def read_back(model: nn.Module, run: Run, folder: Path) -> None:
    """Put the run's own adapter as it was saved in the place of the one that was trained."""
    if run.adapters:
        engine.activate(model)
        engine.detach(model, OWN)
    else:
        engine.detach(model)
    checkpoint.load(model, folder)
    arrange(model, run)
