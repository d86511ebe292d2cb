"""VL-PET's module on a sub-layer: a bottleneck after it, and a gate of some granularity on both, G ⊙ (h + A(h)).

    large      G = σ(V₂ f(V₁ x + c₁) + c₂)               one number for each token and channel
    middleX    G = σ(w · (x + h′) + c)                   one for each token
    middleY    G = 1 + θ                                 one for each channel
    small      G = mean over tokens of σ(w · [x ; h′] + c)      one for each text

x is what goes into the sub-layer, h what comes out of it, and h′ = h + A(h).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.engine.sub_layers import SubLayers
from inlay.errors import UnsupportedError
from inlay.pieces.bottlenecks.bottleneck import (
    AdapterPiece,
    BesidePiece,
    Bottleneck,
    BottleneckFields,
    EnterPiece,
    ScopePiece,
    first_of,
)
from inlay.pieces.bottlenecks.gated import place_of
from inlay.pieces.encoder_blocks import causal
from inlay.pieces.real_tokens import Real, mean_over_text

VARIANTS = ("large", "middleX", "middleY", "small")


class GranularGate(nn.Module):
    """s · G ⊙ (h + A(h)) from what went into a sub-layer, x (…, in), and what came out of it, h (…, out)."""

    def __init__(self, into: int, out: int, method: Any, site: Site, real: Real | None) -> None:
        super().__init__()
        if method.variant == "middleX" and into != out:
            raise UnsupportedError(
                f"VLPET(variant='middleX') cannot sit at {site.name}: its gate adds what goes in and what comes out, "
                f"and {into} features go in and {out} come out; choose another variant"
            )
        self.variant: str = method.variant
        self.scale: float = method.scale
        self.real = real
        parts = bottleneck_fields(method)
        self.adapter = Bottleneck(out, method.r, out, parts, site)
        if self.variant == "large":
            self.gate = Bottleneck(into, method.gate_r, out, parts, site)
        else:
            size = out + into if self.variant == "small" else out
            self.weight = nn.Parameter(torch.zeros(size, **place_of(site)))
            if method.init == "authors":
                nn.init.normal_(self.weight, std=0.02)
            if self.variant != "middleY":
                self.bias = nn.Parameter(torch.zeros(1, **place_of(site)))
        self.hidden: Tensor | None = None
        """Between the two places of a pair: what went into the first."""

    def narrow(self, x: Tensor) -> Tensor:
        """What the first place of a pair keeps for the second."""
        return x

    def opened(self, x: Tensor, h: Tensor) -> Tensor:
        """G, of the shape of h or fit to multiply it."""
        if self.variant == "large":
            gate: Tensor = self.gate(x)
            return torch.sigmoid(gate)
        if self.variant == "middleY":
            return 1 + self.weight.to(h.dtype)
        seen = torch.cat((x, h), dim=-1) if self.variant == "small" else x + h
        opened: Tensor = torch.sigmoid(F.linear(seen, self.weight.to(h.dtype)[None], self.bias.to(h.dtype)))
        return opened if self.variant == "middleX" else mean_over_text(opened, self.real)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        adapted: Tensor = h + self.adapter(h).to(h.dtype)
        gate = self.opened(x.to(h.dtype), adapted).to(h.dtype)
        return self.scale * gate * adapted


def bottleneck_fields(method: Any) -> BottleneckFields:
    """What `Bottleneck` asks of a method."""
    return BottleneckFields("gelu_new", init={"zero_up": "zero_up", "authors": "bert"}[method.init])


def value_adapter(method: Any, site: Site) -> BesidePiece:
    """W_v z + A(z), on a value projection of the decoder."""
    into, out = site.in_features, site.out_features
    return BesidePiece(Bottleneck(into, method.decoder_r, out, bottleneck_fields(method), site))


def sub_layer_widths(site: Site, layers: SubLayers) -> tuple[int, int]:
    """How many features go into a place and come out of it; of an attention, by its first and last projection."""
    if "self_attention" not in site.roles:
        return layers.widths(site)
    inside = [one for one in layers.index.sites if one.kind == "linear" and one.path.startswith(f"{site.path}.")]
    first = next((one.in_features for one in inside if "query" in one.roles), None)
    last = next((one.out_features for one in inside if "output" in one.roles), None)
    if first is None or last is None:
        raise UnsupportedError(
            f"{layers.what} cannot sit at {site.name}: no output projection is known inside it; name one "
            "with targets=..."
        )
    return first, last


def refuse_causal(sites: Iterable[Site], layers: SubLayers) -> None:
    """UnsupportedError where a mean over a text would show tokens what comes after them."""
    blocks = {layers.block(site.path) for site in sites if site.kind != "parameter" and "cross" not in site.roles}
    for site in layers.index.sites:
        block = layers.block(site.path)
        if "self_attention" in site.roles and block in blocks and block is not None and causal(site.module):
            raise UnsupportedError(
                f"{layers.what}(variant='small') cannot sit in {block}: its gate is a mean over the text, and tokens "
                "there must not see later ones; choose another variant"
            )


class GatePiece(AdapterPiece):
    """On a sub-layer that is a module."""

    bottleneck: Any

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))]
        return first_of(inner(*args, **kwargs), lambda h: self.bottleneck(x, h))


class GateLeavePiece(AdapterPiece):
    """On the second projection of a network that is no module of its own."""

    bottleneck: Any

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        x, self.bottleneck.hidden = self.bottleneck.hidden, None
        if x is None:
            raise UnsupportedError(
                "a network's second projection was called without its first, whose input VL-PET's gate reads: call the "
                "module that holds both, or name the places to be gated with targets=..."
            )
        return self.bottleneck(x, inner(*args, **kwargs))


def gated(method: Any, site: Site, layers: SubLayers, real: Real | None, paired: bool) -> list[tuple[Site, Piece]]:
    """The pieces on one sub-layer; a network that is no module of its own (`paired`) has one at each projection."""
    pair = layers.pair(site) if paired else None
    gate: Any
    if pair is None:
        into, out = layers.widths(site) if method.targets is not None else sub_layer_widths(site, layers)
        gate = GranularGate(into, out, method, site, real)
        return [(site, GatePiece(gate))]
    gate = GranularGate(pair.first.in_features, site.out_features, method, site, real)
    return [(pair.holder, ScopePiece(gate)), (pair.first, EnterPiece(gate)), (site, GateLeavePiece(gate))]
