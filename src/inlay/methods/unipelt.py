"""UniPELT: LoRA, prefixes and adapters, each with a gate (Mao et al. 2021, arXiv:2110.07577).

    query, value:    W x + g · B A x
    attention:       softmax(q [g K_p ; K]ᵀ / √d) [g V_p ; V]
    feed-forward:    h + g · A(h), A(h) = W_up f(W_down h); after a norm LN(t + g · A(LN(t))), as Pfeiffer has it
    g = mean over the text of σ(w · x + b), one number for each text and each gate, about 1/2 at the start

The mean is over real tokens. A decoder's tokens would see later ones through it, so that causal attentions are refused.

Parameters of a block of width d: 4 r d + 2 (d + 1); n (d_k + d_v) · key-value heads + d + 1, or those of the MLP behind
(see PrefixTuning); 2 m d + m + d + d + 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from inlay.engine.piece import Piece
from inlay.engine.prompts import attention_sites as places
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError
from inlay.methods.adapter import Adapter
from inlay.methods.lora import LoRA
from inlay.methods.prefix_tuning import PrefixTuning
from inlay.pieces.bottlenecks.bottleneck import AfterPiece, TwicePiece
from inlay.pieces.bottlenecks.gated import GatedBottleneck, GatedLoRA, GatedPrefix, place_of
from inlay.pieces.encoder_blocks import Block, encoder_blocks
from inlay.pieces.prompts.attending import AttendingMethod
from inlay.pieces.prompts.prefix_source import prefix_sources
from inlay.pieces.real_tokens import Gate, Real, TellsReal

PARTS = ("lora", "prefix", "adapter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPELT(AttendingMethod):
    """LoRA on query and value, a prefix in the attention and an adapter after the network, each opened by a gate."""

    kind = "unipelt"
    hosts = frozenset({"linear", "norm", "attention", "module"})
    paper = "Mao et al. 2021, arXiv:2110.07577"
    learning_rate: ClassVar[float] = 5e-4

    use: Sequence[str] = PARTS
    """Which of the parts: lora, prefix, adapter."""
    r: int = 8
    """Rank of LoRA, whose scale is its gate."""
    dropout: float = 0.0
    """Probability of zeroing an entry of x before LoRA's A, in training."""
    num_virtual_tokens: int = 10
    """n, the rows of the prefix in each layer."""
    projection_size: int | None = 512
    """Width of the MLP that computes the prefix; None: the prefix itself is trained."""
    bottleneck: int | None = None
    """Width m of the adapters; None divides the width of the place by `reduction_factor`."""
    reduction_factor: float = 16
    """Width of the place over width of the bottleneck."""
    activation: str = "relu"
    """The adapters' f: relu, gelu, silu, tanh, …"""
    compat: Literal["authors"] | None = None
    """authors: the gates' means count padding, so that a text's answer depends on what it is batched with."""

    def __post_init__(self) -> None:
        if self.targets is not None or self.exclude is not None or self.overrides:
            raise ConfigError("UniPELT has no targets, exclude or overrides: its parts have places of their own")
        object.__setattr__(self, "use", tuple(self.use.split(",") if isinstance(self.use, str) else self.use))
        if not self.use or set(self.use) - set(PARTS):
            raise ConfigError(f"UniPELT(use={self.use!r}): name some of {', '.join(PARTS)}")
        if self.compat not in (None, "authors"):
            raise ConfigError(f"UniPELT(compat={self.compat!r}): choose None or 'authors'")
        self.lora, self.prefix, self.adapter  # noqa: B018  (which check the other fields)

    @property
    def lora(self) -> LoRA:
        """The method whose fields LoRA's part has."""
        return LoRA(r=self.r, dropout=self.dropout)

    @property
    def prefix(self) -> PrefixTuning:
        """The method whose fields the prefix has."""
        return PrefixTuning(num_virtual_tokens=self.num_virtual_tokens, projection_size=self.projection_size)

    @property
    def adapter(self) -> Adapter:
        """The method whose fields the bottlenecks have."""
        return Adapter(bottleneck=self.bottleneck, reduction_factor=self.reduction_factor, activation=self.activation)

    def blocks(self, index: SiteIndex) -> list[Block]:
        """The blocks that it sits in. UnsupportedError for attentions that it cannot open."""
        blocks = encoder_blocks(index, self.layers, "UniPELT")
        if "prefix" in self.use:
            places.check_interface(index.model, [one.attention for one in blocks], "UniPELT")
        return blocks

    def sites(self, index: SiteIndex) -> list[Site]:
        blocks = self.blocks(index)
        return [site for one in blocks for site in (one.block, one.attention, *one.projections, one.network)]

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        index = SiteIndex(model)
        blocks = self.blocks(index)
        made: list[tuple[Site, Piece]] = []
        shapes, sources = [places.key_value_shape(one.attention, index) for one in blocks], []
        if "prefix" in self.use:
            rows = [heads * (keys + values) for heads, keys, values in shapes]
            sources = prefix_sources(self.prefix, model, [one.attention for one in blocks], rows)
        for number, one in enumerate(blocks):
            real = None if self.compat == "authors" else Real()
            if real is not None:
                made.append((one.block, TellsReal(real, one.block.module)))
            if sources:
                bias, first = places.bias_source(one.attention, model), one.projections[0]
                gate = Gate(first.in_features, real, place_of(first))
                shape, attention = shapes[number], one.attention.module
                prefix = GatedPrefix(sources[number], self.num_virtual_tokens, shape, attention, bias, gate)
                made.append((one.attention, prefix))
            if "lora" in self.use:
                made += [(site, GatedLoRA(self.r, self.dropout, site, real)) for site in one.projections]
            if "adapter" in self.use:
                width = self.bottleneck or max(1, int(one.width // self.reduction_factor))
                network = GatedBottleneck(one.width, width, one.width, self.adapter, one.network, real)
                made.append((one.network, (TwicePiece if one.network.kind == "norm" else AfterPiece)(network)))
        return made
