"""Prompts and prefixes in files. A prefix is one tensor there, its layers side by side; a second holds its MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inlay.engine.piece import Piece, take
from inlay.engine.prompts.attention import PrefixAttention
from inlay.errors import CheckpointError

if TYPE_CHECKING:
    from inlay.engine.sites import Site

PROMPT = "prompt_embeddings"  # HF peft's name


@torch.no_grad()
def take_all(own: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Move a file's tensors into those of the same names. CheckpointError for one that is missing or does not fit."""
    for name, tensor in own.items():
        tensor.copy_(take(tensors, name, tensor.shape))


def prefixes(pieces: Sequence[tuple[Site, Piece]]) -> list[PrefixAttention]:
    """The prefixes, in the order of the layers."""
    return [piece for _, piece in pieces if isinstance(piece, PrefixAttention)]


def prefix_tensors(placed: Sequence[PrefixAttention], projected: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(n, all layers' keys and values); for the second file what projects them, by the number of the layer."""
    extra = {
        f"{number}.{name}": tensor
        for number, piece in enumerate(placed)
        for name, tensor in piece.source.state_dict(keep_vars=True).items()
        if projected
    }
    with torch.no_grad():
        return {PROMPT: torch.cat([piece.source() for piece in placed], dim=-1)}, extra


def take_prefix(
    placed: Sequence[PrefixAttention], projected: bool, tensors: dict[str, Tensor], extra: dict[str, Tensor]
) -> None:
    """Take the prefix, or what projects it, from the files."""
    expected, more = prefix_tensors(placed, projected)
    stored = take(tensors, PROMPT, expected[PROMPT].shape)
    if projected:
        if not extra:
            raise CheckpointError("the second file, with the projection behind the prefix, is missing: load with it")
        take_all(more, extra)
        return
    parts = torch.split(stored, [piece.source().shape[1] for piece in placed], dim=-1)
    for piece, part in zip(placed, parts, strict=True):
        piece.source.take(part)  # type: ignore[operator]


def from_slots(tensors: dict[str, Tensor], layers: int) -> None:
    """Put peft's slots of an encoder–decoder in the order of its layers: layer l has slot 2l mod `layers`."""
    stored = tensors.get(PROMPT)
    if stored is not None and stored.ndim == 2 and stored.shape[1] % layers == 0:
        slots = stored.view(stored.shape[0], layers, -1)
        tensors[PROMPT] = slots[:, [2 * layer % layers for layer in range(layers)]].flatten(1)
