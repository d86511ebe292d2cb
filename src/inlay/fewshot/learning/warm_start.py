"""A fresh adapter that starts as a saved one: to go on training it, or to bring it from a task that lies near."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from inlay.engine.adapters import adapters_of, detach
from inlay.engine.checkpoint import load
from inlay.engine.piece import Piece
from inlay.errors import CheckpointError, ConfigError

OWN, OTHER = "default", "start"


def start_from(model: nn.Module, folder: str | Path) -> None:
    """Give the adapter in the model the values of the saved one, method by method, place by place.

    What the saved one has beside is left; a restricted head of other words stays as it is, since words are what a new
    task changes. Raises ConfigError where a method of the adapter has no like there, or one of other sizes.
    """
    load(model, folder, name=OTHER)
    try:
        adapters = adapters_of(model)
        theirs: dict[tuple[str, str], list[Piece]] = {}  # a reversible block has two of one kind at one place
        for method, placed in zip(adapters.get(OTHER).methods, adapters.get(OTHER).placed, strict=True):
            for site, piece in placed:
                theirs.setdefault((method.kind, site.name), []).append(piece)
        own = adapters.get(OWN)
        for method, placed in zip(own.methods, own.placed, strict=True):
            for site, piece in placed:
                like = theirs.get((method.kind, site.name))
                other = like.pop(0) if like else None
                if method.kind == "restricted_head" and _words(other) != _words(piece):
                    continue
                if other is None:
                    raise ConfigError(
                        f"{folder} has no {method.kind} at {site.name} to start from: train with the methods and "
                        "settings that it was made with"
                    )
                try:
                    pairs = piece.values_of(other)
                except CheckpointError as error:
                    raise ConfigError(f"{folder} cannot start the {method.kind} at {site.name}: {error}") from None
                with torch.no_grad():
                    for mine, value in pairs:
                        mine.copy_(value)
    finally:
        detach(model, OTHER)


def _words(piece: object) -> object:
    return getattr(piece, "token_ids", None)
