"""The first and the last real tokens of each text: where they are, and a change of them alone.

Shapes depend on nothing but the numbers asked for, so that a compiled graph holds for any padding on either side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Chosen(NamedTuple):
    """n tokens of each text: their places (B, n), and which of these there are (B, n); a short text has fewer."""

    places: Tensor
    there: Tensor


def ends(real: Tensor, first: int, last: int) -> tuple[Chosen, Chosen]:
    """The first and the last real tokens of `real` (B, T); a token that is both is among the first."""
    rank = real.cumsum(1) - 1  # of a real token among the real ones
    count = real.sum(1, keepdim=True)
    wanted = torch.arange(first, device=real.device).expand(len(real), -1)
    back = count - 1 - torch.arange(last, device=real.device)
    return _at(real, rank, wanted, wanted < count), _at(real, rank, back, back >= first)


def _at(real: Tensor, rank: Tensor, wanted: Tensor, there: Tensor) -> Chosen:
    """Where the real tokens of these ranks (B, n) stand."""
    found = real[:, None] & (rank[:, None] == wanted[..., None])
    return Chosen(found.int().argmax(-1), there)


def at(h: Tensor, chosen: Chosen) -> Tensor:
    """The chosen tokens of h (B, T, d): (B, n, d); anything for one that is not there."""
    return h.gather(1, chosen.places[..., None].expand(-1, -1, h.shape[-1]))


def changed(h: Tensor, chosen: Chosen, change: Tensor) -> Tensor:
    """h (B, T, d) with the change (B, n, d) added at the chosen tokens that are there."""
    change = torch.where(chosen.there[..., None], change, 0)
    return h.scatter_add(1, chosen.places[..., None].expand(-1, -1, h.shape[-1]), change.to(h.dtype))
