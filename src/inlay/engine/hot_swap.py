"""Another adapter's values into one that is loaded, in place.

    inlay.hot_swap(model, "runs/poems-2")        # the same Parameter objects, with what that folder holds

Optimisers, compiled graphs and banks (`per_row`, `switchable`) hold the parameters themselves, so all of them go on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from inlay.engine import checkpoint
from inlay.engine.adapters import Adapter, Placed, adapters_of, base_model, make
from inlay.engine.piece import Method
from inlay.engine.sites import SiteIndex
from inlay.errors import AdapterError, CheckpointError


def hot_swap(model: nn.Module, folder: str | Path, name: str = "default", *, strict: bool = True) -> nn.Module:
    """Give the loaded adapter `name` the values of the adapter in `folder`; returns the same model.

    The folder has to hold the same methods at the same places. A LoRA of a lower rank is filled up with zeros, and one
    of another scale has the ratio multiplied into B. What is active or trainable, and the rate of dropout, stay as they
    are; so does an optimiser's momentum.

    Raises AdapterError when `name` is not loaded or anything is merged, CheckpointError for files that are damaged or
    do not fit, and BaseModelError when the file was made for another base model (`strict=False` insists). Everything is
    checked before the first value is written.
    """
    adapters, folder = adapters_of(model), Path(folder)
    slot = adapters.get(name)
    if adapters.state.merged:
        raise AdapterError(f"adapters {list(adapters.state.merged)} are merged: call inlay.unmerge(model) first")
    new = _read(SiteIndex(base_model(model)), folder, name, strict)
    values = _values(slot, new, folder)
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)
    return model


def _read(index: SiteIndex, folder: Path, name: str, strict: bool) -> Adapter:
    """The adapter in the folder, outside the model."""
    with checkpoint.blaming(folder):
        file = checkpoint.read(folder, index, strict)
        adapter = checkpoint.make(make, index, file, name)
        checkpoint.fill(index, adapter, file)
    return adapter


def _values(slot: Adapter, new: Adapter, folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of the slot with its new value; CheckpointError where the two adapters are not alike."""
    mine, theirs = ([type(method).__name__ for method in adapter.methods] for adapter in (slot, new))
    if mine != theirs:
        raise CheckpointError(
            f"{folder} holds {', '.join(theirs)}, and adapter {slot.name!r} is {', '.join(mine)}: load it beside, with "
            "inlay.load(model, folder, name=...)"
        )
    values: list[tuple[Tensor, Tensor]] = []
    for method, here, there in zip(slot.methods, slot.placed, new.placed, strict=True):
        _same_places(method, slot.name, here, there, folder)
        for (site, piece), (_, other) in zip(here, there, strict=True):
            try:
                values += piece.values_of(other)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{folder} does not fit into adapter {slot.name!r}: at {site.name}, {error}; load it beside, with "
                    "inlay.load(model, folder, name=...)"
                ) from None
    return values


def _same_places(method: Method, name: str, here: Placed, there: Placed, folder: Path) -> None:
    mine, theirs = ([site.name for site, _ in placed] for placed in (here, there))
    if mine != theirs:
        differ = sorted({*mine} ^ {*theirs}) or theirs
        only = "the loaded adapter" if differ[0] in mine else "the file"
        raise CheckpointError(
            f"{folder} has its {type(method).__name__} at {len(theirs)} places, and adapter {name!r} at {len(mine)}: "
            f"{differ[0]} is in {only} only; load it beside, with inlay.load(model, folder, name=...)"
        )
