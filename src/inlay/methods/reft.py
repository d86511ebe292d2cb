"""ReFT: representation fine-tuning (Wu et al. 2024, arXiv:2404.03592): edits of hidden states at a few tokens.

    loreft    h + Rᵀ(W h + b − R h)         R (r, d) with orthonormal rows, W (r, d)
    noreft    h + W₂ᵀ(W h + b − W₂ h)       W₂ without a constraint
    direft    h + W₂ᵀ(W h + b)              and without the difference

h comes out of a block, at the first and the last tokens of a text; padding counts as none. R is trained as any matrix
and made orthonormal at each use (Gram and Schmidt's way), so that it is so whatever the optimiser did. With
`init="identity"` W starts as R (or W₂; zero for direft) and b at zero, so the model starts as the base.

Parameters: 2 r d + r for each block, twice that where first and last tokens have edits of their own.
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
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.checks import CheckedMethod
from inlay.pieces.edits import EditPiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReFT(CheckedMethod):
    """h + Rᵀ(W h + b − R h) on what comes out of the blocks, at the first and last tokens of each text."""

    kind = "reft"
    hosts = frozenset({"module"})
    default_targets = "role:block"
    paper = "Wu et al. 2024, arXiv:2404.03592"
    learning_rate: ClassVar[float] = 9e-4

    variant: Literal["loreft", "noreft", "direft"] = "loreft"
    """Which edit: loreft, noreft or direft."""
    r: int = 8
    """Rank of the edit."""
    first: int = 7
    """How many tokens from the beginning are edited."""
    last: int = 0
    """How many tokens up to the end are edited."""
    tied: bool = False
    """Whether first and last tokens share one edit."""
    dropout: float = 0.0
    """Probability of zeroing an entry of the change (not of h), in training."""
    init: Literal["identity", "authors"] = "identity"
    """identity: starts as the base; authors: W and b as torch starts a linear, which does not."""
    compat: Literal["authors"] | None = None
    """authors: direft's W₂ orthonormal too, as in their code and not in the paper."""

    def __post_init__(self) -> None:
        self.check_choice("variant", ("loreft", "noreft", "direft"))
        self.check_choice("init", ("identity", "authors"))
        self.check_choice("compat", (None, "authors"))
        self.check_whole("r")
        self.check_whole("first", "last", least=0)
        if not self.first + self.last:
            raise ConfigError("ReFT(first=0, last=0) edits no token: one of them is to be 1 or more")
        self.check_rate("dropout")

    @property
    def orthogonal(self) -> bool:
        """Whether the projection is kept orthonormal."""
        return self.variant == "loreft" or (self.variant == "direft" and self.compat == "authors")

    @property
    def difference(self) -> bool:
        """Whether P h is taken away."""
        return self.variant != "direft"

    def sites(self, index: SiteIndex) -> list[Site]:
        found, encoder = super().sites(index), encoder_of(index.model)
        if self.targets is None and encoder is not None:
            inside = {id(module) for module in encoder.modules()}
            found = [site for site in found if id(site.module) in inside]
        for site in found:
            batches = getattr(getattr(site.module, "self_attn", None), "batch_first", True)
            if "block" not in site.roles or not batches:
                why = "it is no block" if batches else "its batch comes second: make it with batch_first=True"
                raise UnsupportedError(f"ReFT cannot sit at {site.name} ({type(site.module).__name__}): {why}")
        return found

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        layers, made = SubLayers(SiteIndex(model), type(self).__name__), list[tuple[Site, Piece]]()
        for site in sites:
            width = layers.widths(site)[1]
            if self.r > width:
                raise ConfigError(f"ReFT(r={self.r}): what comes out of {site.name} has {width} dimensions only")
            made.append((site, EditPiece(self.at(site), width, site)))
        return made
