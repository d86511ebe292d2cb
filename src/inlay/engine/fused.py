"""Pieces that compute in another way what a host would: kept apart from the adapters', and gone with the last of them.

A fused piece has no parameters and is the outermost layer of its host's onion whenever some adapter runs. It looks at
what lies inside at each call, and calls it unless this is exactly what it knows how to compute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from inlay.engine.host import FUSED, close_host, inlays_of, open_host
from inlay.engine.sites import is_conv1d

if TYPE_CHECKING:
    from inlay.engine.adapters import Adapters
    from inlay.engine.piece import Piece


def insert(adapters: Adapters, module: nn.Module, kind: str, piece: Piece) -> None:
    """Set a fused piece into a module."""
    inlays = open_host(module, adapters.state, is_conv1d(module))
    inlays.insert(FUSED, kind, piece, None)
    inlays.get_submodule(FUSED).train(module.training)
    adapters.fused.append(module)


def remove(adapters: Adapters) -> None:
    """Take all fused pieces out; modules that hold nothing else become what they were."""
    for module in adapters.fused:
        inlays = inlays_of(module)
        if inlays is not None:
            inlays.remove(FUSED)
            if inlays.empty:
                close_host(module)
    adapters.fused.clear()
