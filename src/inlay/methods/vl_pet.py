"""VL-PET: adapters with gates of a chosen granularity, for encoder–decoders that read images (Hu et al. 2023,
arXiv:2308.09804).

    encoder, attention and network:     s · G ⊙ h′,  h′ = h + A(h),  A(h) = W_up f(W_down h);  x goes in, h comes out
        large      G = σ(V₂ f(V₁ x)), a number for each token and channel
        middleX    σ(w · (x + h′)), for each token
        middleY    1 + θ, for each channel
        small      mean over tokens of σ(w · [x ; h′]), for each text
    decoder, values of the cross-attention:     W_v z + A(z)

The norms of the encoder are trained too. Visual features go into the encoder as vectors before those of the text.
The heads of the paper's down-projection are one linear, cut into parts. With `init="zero_up"` W_up, V₂, w and θ start
at zero: then middleY starts as the base, and the others with G = 1/2, which halves what a sub-layer adds.

Parameters: 2 d r + r + d for each of the two sub-layers and each cross-attention; for G (large) 2 d r_g + r_g + d,
d + 1, d, 2 d + 1. BART-base: 1,779,840 in adapters, as many in large gates, 889,920 in the decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from inlay.engine.piece import Piece
from inlay.engine.prompts.entry import encoder_of
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.sub_layers import SubLayers
from inlay.engine.trained_copy import copies
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.bottlenecks.granular_gate import VARIANTS, gated, refuse_causal, value_adapter
from inlay.pieces.checks import CheckedMethod
from inlay.pieces.real_tokens import Real, TellsReal


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLPET(CheckedMethod):
    """s · G ⊙ (h + A(h)) in the encoder and W_v z + A(z) in the decoder: gates as fine as the images ask for."""

    kind = "vl_pet"
    hosts = frozenset({"linear", "module"})
    default_targets = "role:self_attention"  # in a few words: and networks of the encoder, values of the decoder
    paper = "Hu et al. 2023, arXiv:2308.09804"
    learning_rate: ClassVar[float] = 1e-3

    variant: Literal["large", "middleX", "middleY", "small"] = "large"
    """Granularity of the gates G."""
    r: int = 96
    """Width of the encoder's adapters."""
    gate_r: int = 96
    """With large: width of the gates."""
    decoder_r: int = 96
    """Width of the decoder's adapters."""
    scale: float = 1.0
    """s; the paper's for T5 is 0.3."""
    init: Literal["zero_up", "authors"] = "zero_up"
    """zero_up: all that comes last starts at zero; authors: every matrix, w and θ from N(0, 0.02²)."""
    train_norms: bool = True
    """Train the encoder's normalisation layers too."""

    def __post_init__(self) -> None:
        self.check_choice("variant", VARIANTS)
        self.check_choice("init", ("zero_up", "authors"))
        self.check_whole("r", "gate_r", "decoder_r")
        self.check_number("scale")
        if self.exclude is not None and self.targets is None:
            raise ConfigError("VLPET has exclude with targets only: its own places go by layers")
        if self.overrides:
            raise ConfigError("VLPET has no overrides: attach two of them, each with its own targets")

    def sites(self, index: SiteIndex) -> list[Site]:
        if self.targets is not None:
            return index.select(
                self.targets, hosts=self.hosts, exclude=self.exclude, layers=self.layers, what=type(self).__name__
            )
        found = super().sites(index)
        encoder = encoder_of(index.model)
        if encoder is None:
            raise UnsupportedError(
                f"VLPET needs an encoder–decoder, and {type(index.model).__name__} is none; name the sub-layers to be "
                "gated with targets=..."
            )
        inside, layers = {id(module) for module in encoder.modules()}, SubLayers(index, type(self).__name__)
        attentions = [site for site in found if id(site.module) in inside]
        blocks = {layers.block(site.path) for site in attentions}
        networks = [site for site in layers.feed_forwards() if layers.block(site.path) in blocks]
        values = index.select(
            lambda site: {"cross", "value"} <= site.roles,
            hosts=frozenset({"linear"}), layers=self.layers, what=type(self).__name__,
        )  # fmt: skip
        norms = [site for site in layers.norms(self.layers) if id(site.module) in inside] if self.train_norms else []
        return [*attentions, *networks, *values, *norms]

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        layers, made = SubLayers(SiteIndex(model), type(self).__name__), list[tuple[Site, Piece]]()
        reals: dict[str | None, Real] = {}
        if self.variant == "small":
            refuse_causal(sites, layers)
        for site in (site for site in sites if site.kind != "parameter"):
            if self.targets is None and "cross" in site.roles:
                made.append((site, value_adapter(self, site)))
                continue
            block = layers.block(site.path)
            if block is not None and block not in reals:
                reals[block] = Real()
                made.append((layers.named[block], TellsReal(reals[block], layers.named[block].module)))
            paired = self.targets is None and site.kind == "linear"
            made += gated(self, site, layers, reals.get(block), paired)
        return made + copies(site for site in sites if site.kind == "parameter")

    def file_key(self, site: Site, name: str) -> str:
        return super().file_key(site, name) if name else f"base_model.model.{site.name}"
