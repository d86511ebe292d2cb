"""DEFT: density-efficient fine-tuning (Runwal et al. 2024, arXiv:2402.01911). Not HF peft's DEFT, which is `deft`.

    loss + w · D,     D = mean over networks, positions and features of a² / (a² + ε)

a are the activations of the feed-forward networks, as the second projection reads them. D tends to their density, the
share of entries that are not zero, as ε goes to 0. It goes beside a method that has parameters to lower it with:
`inlay.attach(model, [LoRA(), DensityLoss()])`. Positions that are padding do not count; of an encoder–decoder the means
over both stacks are summed, as in the authors' code. `inlay.density` measures what was reached.

ADA-DEFT (`adaptive=True`): each network's output is multiplied by a trained g, which starts at one, and its part of D
by |g|; in evaluation a network with |g| < skip_below is not computed. The authors' code has none: the form is ours.

Parameters: none; 1 for each network with `adaptive`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from inlay.engine.controller import Controller
from inlay.engine.piece import Method, Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError
from inlay.pieces.density.networks import firsts, watch_of
from inlay.pieces.density.watching import ActivationPiece, DensityTerm, FirstProjection, Watch, stack_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityLoss(Method):
    """loss + w · mean a² / (a² + ε): fewer activations that are not zero, beside any method."""

    kind = "density"
    default_targets = "down"
    paper = "Runwal et al. 2024, arXiv:2402.01911"

    weight: float = 1.0
    """w."""
    eps: float = 1e-7
    """ε: from about which a² on an entry counts as not zero. Larger values reach entries that are farther from zero."""
    adaptive: bool = False
    """Train a gate for each network, and leave out those whose gate has closed."""
    skip_below: float = 0.05
    """The least |g| with which a network is still computed in evaluation."""

    def __post_init__(self) -> None:
        for name in ("weight", "eps", "skip_below"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ConfigError(f"DensityLoss({name}={value!r}): a number of at least 0 is needed")
        if not self.eps:
            raise ConfigError("DensityLoss(eps=0): the loss would have no gradient; the paper's is 1e-7")
        if self.overrides:
            raise ConfigError("DensityLoss has the same fields everywhere: leave overrides out")

    def sites(self, index: SiteIndex) -> list[Site]:
        seconds = super().sites(index)
        return [*seconds, *(site for site in firsts(index, seconds) if self.adaptive and site not in seconds)]

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        index = SiteIndex(model)
        chosen = {site.name for site in super().sites(index)}
        watch, shut = Watch.of(model), self.skip_below if self.adaptive else None
        pieces: list[tuple[Site, Piece]] = []
        for second in (site for site in sites if site.name in chosen):
            piece = ActivationPiece(second, watch, stack_of(model, second.path), self.eps, shut)
            pieces.append((second, piece))
            near = {site.name for site in firsts(index, [second])} - chosen
            pieces += [(site, FirstProjection(site, piece)) for site in sites if site.name in near]
        return pieces

    def on_attach(self, model: nn.Module, pieces: Sequence[tuple[Site, Piece]]) -> None:
        watch_of(pieces).open_on(model)

    def on_detach(self, model: nn.Module, pieces: Sequence[tuple[Site, Piece]]) -> None:
        watch_of(pieces).close()

    def controller(self, pieces: Mapping[str, Piece]) -> Controller:
        networks = Counter(piece.stack for piece in pieces.values() if isinstance(piece, ActivationPiece))
        return DensityTerm(watch_of(list(pieces.items())), self.weight, networks)

    def rides_with(self, methods: Sequence[Method]) -> bool:
        return not self.adaptive
