"""The blocks of a model whose self-attention looks both ways, and the places in them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from inlay.engine.sites import Site, SiteIndex
from inlay.engine.sub_layers import SubLayers
from inlay.errors import UnsupportedError


class Block(NamedTuple):
    """A block, its self-attention, the projections in that with query or value in them, and its network."""

    block: Site
    attention: Site
    projections: list[Site]
    network: Site
    """The feed-forward network, or the norm that follows it."""
    width: int
    """Of what comes out of the network."""


def causal(attention: nn.Module) -> bool:
    """Whether the tokens of an attention see none after themselves."""
    return bool(getattr(attention, "is_causal", getattr(attention, "is_decoder", False)))


def encoder_blocks(index: SiteIndex, layers: Any, what: str) -> list[Block]:
    """The blocks (of those layers only). UnsupportedError where every self-attention is causal."""
    found = index.select("role:self_attention", hosts=frozenset({"module"}), layers=layers, what=what)
    attentions = [site for site in found if not causal(site.module)]
    if not attentions:
        raise UnsupportedError(
            f"{what} needs a self-attention that looks both ways, since its gates are means over a whole text, and "
            f"{type(index.model).__name__} has none; use MAM"
        )
    for site in index.sites:
        if "block" in site.roles and getattr(site.module, "chunk_size_feed_forward", False):
            raise UnsupportedError(
                f"{what}'s gates are means over a whole text, and {site.path} runs its network on pieces of it: set "
                "config.chunk_size_feed_forward to 0 before the model is made"
            )
    sub_layers = SubLayers(index, what)
    linears = [site for site in index.sites if site.kind == "linear" and site.roles & {"query", "value"}]
    networks = {sub_layers.block(site.path): site for site in sub_layers.places("pfeiffer")}
    blocks = []
    for attention in attentions:
        path = sub_layers.block(attention.path)
        if path is None or path not in networks:
            raise UnsupportedError(f"{what}: no feed-forward network is known beside {attention.path}")
        inside = [site for site in linears if site.path.startswith(f"{attention.path}.")]
        width = sub_layers.widths(networks[path])[1]
        blocks.append(Block(sub_layers.named[path], attention, inside, networks[path], width))
    return blocks
