"""A subset of a model's parameters: which entries of which, and of what base. Plain data, kept in one file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from inlay.engine.fingerprint import compare
from inlay.engine.tensor_file import write_tensors
from inlay.errors import BaseModelError, CheckpointError


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Entries of parameters, by the parameters' names. `inlay.select` makes one; so may anybody by hand."""

    entries: Mapping[str, Tensor | None]
    """Sorted indices (int64) into each parameter, flattened as it is stored; None: all of it."""
    shapes: Mapping[str, tuple[int, ...]]
    """The parameters' shapes, as stored."""
    base: Mapping[str, Any]
    """What the model was (`inlay.engine.fingerprint`); empty: fits wherever names and shapes do."""
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How it was chosen: budget, score, granularity, seed, …"""
    values: Mapping[str, Tensor] | None = None
    """What the entries start with beside the base's own values; None: nothing, which is zero."""

    @property
    def count(self) -> int:
        """How many entries there are."""
        return sum(self.counts().values())

    def counts(self) -> dict[str, int]:
        """How many of each parameter."""
        sizes = self.entries.items()
        return {name: math.prod(self.shapes[name]) if where is None else len(where) for name, where in sizes}

    def mask(self, name: str) -> Tensor:
        """Where the entries of one parameter are, in its shape."""
        where = self.entries.get(name, torch.zeros(0, dtype=torch.int64))
        if where is None:
            return torch.ones(self.shapes[name], dtype=torch.bool)
        flat = torch.zeros(math.prod(self.shapes[name]), dtype=torch.bool)
        flat[where] = True
        return flat.view(self.shapes[name])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Subset) or self.entries.keys() != other.entries.keys():
            return NotImplemented if not isinstance(other, Subset) else False
        pairs = [(self.entries[name], other.entries[name]) for name in self.entries]
        return dict(self.shapes) == dict(other.shapes) and all(
            a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs
        )

    __hash__ = None  # type: ignore[assignment]

    def check(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Raise BaseModelError where these parameters, or the model they are of, are not the subset's own."""
        for name in self.entries:
            here = tuple(parameters[name].shape) if name in parameters else None
            if here != tuple(self.shapes[name]):
                found = "no such parameter here" if here is None else f"it has shape {here} here"
                raise BaseModelError(f"the subset has {name} of shape {tuple(self.shapes[name])}; there is {found}")
        if self.base:
            try:
                compare(self.base, model)
            except BaseModelError as error:
                raise BaseModelError(str(error).replace("this adapter", "this subset", 1)) from None

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"entries.{name}": where for name, where in self.entries.items() if where is not None}
        tensors |= {f"values.{name}": value for name, value in (self.values or {}).items()}
        said = {"shapes": {name: list(shape) for name, shape in self.shapes.items()}, "base": dict(self.base)}
        whole = [name for name, where in self.entries.items() if where is None]
        text = json.dumps({**said, "made": dict(self.made), "whole": whole, "valued": self.values is not None})
        write_tensors(path, {key: value.contiguous() for key, value in tensors.items()}, {"inlay_subset": text})
        return path

    @classmethod
    def read(cls, path: str | Path) -> Subset:
        """What `save` wrote. Raises CheckpointError for a file that is missing, damaged or something else."""
        try:
            with safe_open(str(path), "pt") as file:
                text = (file.metadata() or {}).get("inlay_subset")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"no subset can be read from {path}: {error}") from error
        if text is None:
            raise CheckpointError(f"{path} is no subset of Inlay's: inlay.select(…).save(path) writes one")
        said = json.loads(text)
        entries: dict[str, Tensor | None] = dict.fromkeys(said["whole"])
        entries |= {key.removeprefix("entries."): v for key, v in tensors.items() if key.startswith("entries.")}
        values = {key.removeprefix("values."): v for key, v in tensors.items() if key.startswith("values.")}
        order = [name for name in said["shapes"] if name in entries]
        shapes = {name: tuple(said["shapes"][name]) for name in order}
        ordered = {name: entries[name] for name in order}
        return cls(ordered, shapes, said["base"], said["made"], values if said["valued"] else None)
