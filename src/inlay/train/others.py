"""The adapters of other runs that a run is made on, as settings: which, under which names, and how they are composed.

    adapters: {sst2: runs/sst2, law: runs/law}      # loaded before the method, and frozen
    method: adapter_fusion                          # over all of them, unless it names some itself
    compose: {stack: [sst2, default]}               # or without fusion: what runs; `default` is the run's own

Reading and checking this imports no torch; `loaded.py` does what it says.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from inlay.combining.composition import BatchSplit, Parallel
from inlay.combining.trees import OWN, composed, compositions_of, names_of, plain
from inlay.engine import catalogue
from inlay.errors import ConfigError, did_you_mean

SHORT: dict[str, dict[str, Any]] = {
    "fusion": {"kind": "adapter_fusion"},
    "x_lora": {"kind": "xlora"},
    "scalearn_uniform": {"kind": "scalearn", "uniform": True},
    "scalearn++": {"kind": "scalearn", "shared": True},
    "scalearn_uniform++": {"kind": "scalearn", "uniform": True, "shared": True},
}
"""Names of methods over adapters, and of their published variants, that are no file's."""


def adapters_from(value: Any) -> dict[str, str]:
    """Name → folder. Raises ConfigError for names that cannot be used, and for what is no mapping."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"adapters must be a mapping such as {{sst2: runs/sst2}}; got {value!r}")
    for name, folder in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"{name!r} cannot name an adapter: use letters, digits, '_' and '-', as in 'law-2'")
        if name == OWN:
            raise ConfigError(f"adapters: {OWN!r} is the run's own adapter; give {str(folder)!r} another name")
        if not isinstance(folder, str | Path) or not str(folder).strip():
            raise ConfigError(f"adapters.{name} must be a folder, of a run or of an adapter; got {folder!r}")
    return {name: str(folder) for name, folder in value.items()}


def over_adapters(fields: Mapping[str, Any], adapters: Collection[str]) -> dict[str, Any]:
    """A method's fields; of a method over adapters, with the names of all of the run's where it gives none.

    Raises ConfigError where the run loads none of a name, or none at all.
    """
    kind = fields["kind"]
    if kind not in catalogue.combining():
        return dict(fields)
    if not adapters:
        raise ConfigError(
            f"{kind} is made of adapters that are loaded first, and the run loads none: add --adapters NAME=FOLDER for "
            "each, or `adapters: {name: folder}`"
        )
    names = fields.get("adapters") or list(adapters)
    for name in [names] if isinstance(names, str) else names:
        if name not in adapters:
            raise ConfigError(
                f"{kind} names the adapter {name!r}, which the run does not load (it loads {', '.join(adapters)})"
                f"{did_you_mean(str(name), adapters)}: add --adapters {name}=FOLDER"
            )
    return {**fields, "adapters": names if isinstance(names, str) else list(names)}


def composition_from(value: Any, adapters: Collection[str], methods: Sequence[Mapping[str, Any]] = ()) -> Any:
    """The composition as plain data, None for none. Raises ConfigError for what a run cannot run."""
    inside = {name for fields in methods if fields["kind"] in catalogue.combining() for name in fields["adapters"]}
    if value is None:
        if adapters and not inside:
            first = next(iter(adapters))
            raise ConfigError(
                f"the run loads {', '.join(adapters)} and nothing uses them: --compose {first} trains on top of it, "
                "--method adapter_fusion (scalearn, xlora) learns what to take from each"
            )
        return None
    part = composed(value)
    for one in compositions_of(part):
        if isinstance(one, Parallel | BatchSplit):
            why = "gives several answers for each row" if isinstance(one, Parallel) else "goes by a row's number"
            raise ConfigError(
                f"compose: {one!r} {why}, and a run has one answer a row, in no order: evaluate the parts one by one, "
                "or use inlay.activate in a loop of your own"
            )
    for name in names_of(part):
        if name not in (*adapters, OWN):
            known = [*adapters, OWN]
            raise ConfigError(
                f"compose names the adapter {name!r}, and the run has {', '.join(known)}{did_you_mean(name, known)}"
            )
        if name in inside:
            raise ConfigError(f"compose names {name!r}, which runs inside the run's own method already: leave it out")
    return plain(part)
