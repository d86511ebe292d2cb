"""MEFT: memory-efficient fine-tuning. The pretrained blocks become a reversible stack (Liao, Tan, Monz 2023,
arXiv:2306.00477), whose activations the backward pass computes again from its output instead of keeping them.

    y1 = λ x1 + F(x2),  y2 = β x2 + G(y1)        the stack gives (y1 + y2) / 2 of its last block

    variant 1    F = a block and an adapter beside its feed-forward network, G = an adapter;  λ = 0.1, β = 1
    variant 2    F = an adapter, G = such a block;  λ = 1, β = 0.1
    variant 3    F = the attention half and an adapter after it, G = the feed-forward half and an adapter beside it;
                 λ = β = 0.1

In 1 and 2 the streams change places after each block. The adapters W_up f(W_down x) start near zero (N(0, 0.02²)), so
that a block starts near what it was; with λ or β → 0 the output would be the mean of the last two hidden states.

Parameters: 2 · (2 m d + m + d) for each block, m = 8. BERT-base: 24 · 13,064 = 313,536.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError
from inlay.kernels.reversible import longest_segment
from inlay.pieces.bottlenecks.bottleneck import ACTIVATIONS, Bottleneck, BottleneckFields
from inlay.pieces.checks import CheckedMethod
from inlay.pieces.reversible.places import Halves, activation_of, block_sites, stacks
from inlay.pieces.reversible.stack import GAINS, ReversibleStack

PUBLISHED = {1: (0.1, 1.0), 2: (1.0, 0.1), 3: (0.1, 0.1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MEFT(CheckedMethod):
    """y1 = λ x1 + F(x2), y2 = β x2 + G(y1): the blocks as a reversible stack, with adapters in F and G."""

    kind = "meft"
    hosts = frozenset({"module"})
    default_targets = "block"
    paper = "Liao, Tan, Monz 2023, arXiv:2306.00477"
    learning_rate: ClassVar[float] = 5e-4

    variant: Literal[1, 2, 3] = 1
    """Which of the three forms."""
    bottleneck: int = 8
    """Width m of the adapters."""
    lambda_: float | None = None
    """λ; None: the published one."""
    beta: float | None = None
    """β; None: the published one."""
    tolerance: float = 1e-3
    """Largest error of a stream, by the error bound, relative to its largest entry: says how often streams are kept."""
    keep_every: int | None = None
    """Blocks between two kept streams; None: as many as `tolerance` allows."""
    activation: str | None = None
    """The function f of the adapters; None: the model's own."""
    dropout: float = 0.0
    """Probability of zeroing an entry of an adapter's hidden layer, in training."""
    compat: Literal["authors"] | None = None
    """"authors": the published constants and no kept streams, whatever inversion then loses."""

    def __post_init__(self) -> None:
        self.check_choice("variant", PUBLISHED)
        self.check_whole("bottleneck", "keep_every")
        self.check_positive("lambda_", "beta", "tolerance")
        self.check_rate("dropout")
        self.check_choice("activation", ACTIVATIONS)
        self.check_choice("compat", (None, "authors"))
        if self.compat and (self.lambda_, self.beta, self.keep_every) != (None, None, None):
            raise ConfigError("MEFT(compat='authors') fixes lambda_, beta and keep_every: leave them out")
        if self.overrides:
            raise ConfigError("MEFT has no overrides: its blocks are coupled alike")

    @property
    def scales(self) -> tuple[float, float]:
        """λ and β."""
        lambda_, beta = PUBLISHED[self.variant]
        return self.lambda_ or lambda_, self.beta or beta

    def sites(self, index: SiteIndex) -> list[Site]:
        return block_sites(index, self.targets, self.exclude, self.layers, type(self).__name__)

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        method = self.replace(activation=self.activation or activation_of(model, tuple(ACTIVATIONS)))
        halves = Halves(SiteIndex(model), method.network, type(self).__name__)  # type: ignore[attr-defined]
        made: list[tuple[Site, Piece]] = []
        for blocks in stacks(sites):
            every = self.every(blocks[0].dtype, len(blocks))
            made += halves.placed(ReversibleStack(self.variant, self.scales, every, len(blocks)), blocks)
        return made

    def every(self, dtype: torch.dtype, depth: int) -> int:
        """Blocks between two kept streams, for a model in this dtype (streams are fp32 at least)."""
        if self.compat or self.keep_every:
            return self.keep_every or depth
        streams = torch.promote_types(dtype if dtype.is_floating_point else torch.float32, torch.float32)
        return longest_segment(self.scales, GAINS[self.variant], self.variant != 3, streams, self.tolerance, depth)

    def network(self, into: int, out: int, site: Site) -> Bottleneck:
        """A fresh adapter, on the device of a place."""
        return Bottleneck(into, self.bottleneck, out, BottleneckFields(self.activation or "gelu", self.dropout), site)
