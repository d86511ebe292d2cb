"""Compacter: adapters of Kronecker products (Karimi Mahabadi et al. 2021, arXiv:2106.04647).

    A(x) = f(x W_down + b_down) W_up + b_up,     W = Σ_{i=1..n} A_i ⊗ (s_i t_iᵀ)

A_i (n, n) are one set for all adapters of the model; s_i (in / n, r) and t_i (out / n, r) have rank r, 1 in the paper.
`placement="houlsby"` is Compacter: after every self-attention and every feed-forward network; `"pfeiffer"` is
Compacter++: after feed-forward networks only. `r=None` leaves the factors beside A_i whole: the paper's PHM-Adapter.
With `init="zero_up"` the t_i of W_up start at zero, so the model starts as the base.

Parameters: 2 r (d + m) + d + m for each place, m = d / 32 down to a multiple of n; n³ once; the norms. T5-base:
Compacter 161,728, Compacter++ 104,704, of which 47,616 in norms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError
from inlay.methods.adapter import Adapter
from inlay.pieces.bottlenecks.bottleneck import AdapterPiece
from inlay.pieces.bottlenecks.phm import PHMBottleneck, share_rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compacter(Adapter):
    """h + f(h W_down) W_up with W = Σ_i A_i ⊗ (s_i t_iᵀ): an adapter of some thousand parameters a place, or fewer."""

    kind = "compacter"
    paper = "Karimi Mahabadi et al. 2021, arXiv:2106.04647"
    learning_rate: ClassVar[float] = 3e-3
    inits: ClassVar[tuple[str, ...]] = ("zero_up", "authors")

    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """Where the adapter stands: houlsby is Compacter, pfeiffer Compacter++."""
    reduction_factor: float = 32
    """Width of the place over width of the bottleneck."""
    activation: str = "gelu_new"
    """The function f."""
    init: Literal["zero_up", "authors"] = "zero_up"  # type: ignore[assignment]
    """zero_up: Glorot but for W_up's t, zero, and A from N(0, 1/n); authors: all Glorot, A from N(0, 10⁻⁸)."""
    train_norms: bool | None = True
    """Train the normalisation layers too."""
    n: int = 4
    """Number of Kronecker products; it divides the width of every place."""
    r: int | None = 1
    """Rank of the factors beside A_i; None: whole matrices."""
    shared_rule: bool = True
    """Whether all places have the same A_i."""
    cross_attention: bool = False
    """With placement="houlsby": after cross-attentions too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "r"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1) and (name, value) != ("r", None):
                raise ConfigError(f"Compacter({name}={value!r}): a whole number of at least 1 is needed")

    @property
    def rule_deviation(self) -> float:
        """Standard deviation of the entries of A at the start."""
        return self.n**-0.5 if self.init == "zero_up" else 1e-4

    def sites(self, index: SiteIndex) -> list[Site]:
        found = super().sites(index)
        if self.targets is not None or self.cross_attention:
            return found
        return [site for site in found if site.kind == "parameter" or "cross" not in site.roles]

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        made = super().build(model, sites)
        if self.shared_rule:
            share_rules(piece.bottleneck for _, piece in made if isinstance(piece, AdapterPiece))
        return made

    def network(self, into: int, out: int, site: Site) -> PHMBottleneck:
        width = self.bottleneck or max(self.n, int(out // self.reduction_factor) // self.n * self.n)
        for size in (into, width, out):
            if size % self.n:
                raise ConfigError(f"Compacter(n={self.n}) at {site.name}: n has to divide {into}, {width} and {out}")
        return PHMBottleneck(into, width, out, self, site)
