"""Scores that training decides: every entry is trained for a while, and what moved is what matters.

    lottery    |θ_T − θ|                     all entries trained alike              (LT-SFT, Ansell et al. 2021)
    l0         |z ⊙ w|,   θ′ = θ + z ⊙ w     each entry behind a gate z that costs  (diff pruning, Guo et al. 2020)

    z = clip(s (r − l) + l, 0, 1),   s = σ(log u − log(1 − u) + α),   u uniform;  s = σ(α) in evaluation
    expected cost  λ Σ σ(α − log(−l / r)) · σ(α_group − log(−l / r)),    l = −1.5, r = 1.5

The gate of an entry is multiplied by one of its tensor's (the structured form). The base is not written to: what is
trained are pieces, which leave with the new heads that were trained beside them. Memory: that of full fine-tuning, and
with gates twice that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.engine.adapters import adapters_of, attach, controllers, detach, find_adapters
from inlay.engine.batches import Batches, looked_at
from inlay.engine.controller import Controller
from inlay.engine.parameters import with_tied
from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.trained_copy import CopyMethod, copies
from inlay.errors import AdapterError

SEARCHES = ("lottery", "l0")
LOW, HIGH = -1.5, 1.5
SHIFT = math.log(-LOW / HIGH)
OPEN = 5.0
"""α at the start: gates are all but surely open."""
GATE_LEARNING_RATE = 0.1
NAME = "search"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """How everything is trained; `l0_penalty` is λ."""

    steps: int = 300
    learning_rate: float = 3e-5
    l0_penalty: float = 1.25e-7
    seed: int = 0


def changes(
    kind: str, index: SiteIndex, sites: Sequence[Site], search: Search, batches: Batches, beside: Sequence[str]
) -> list[Tensor]:
    """What each of these parameters changed by, fp32, with the modules `beside` trained too. The model is left as it
    was.
    """
    model = index.model
    if find_adapters(model) is not None:
        raise AdapterError(f"score={kind!r} trains the model, and adapters are attached to it: detach them first")
    method = Everything(names=tuple(site.name for site in sites), penalty=search.l0_penalty if kind == "l0" else None)
    with looked_at(model):
        torch.manual_seed(search.seed)
        attach(model, method, name=NAME, modules_to_save=list(beside))
        try:
            model.train()
            _train(model, search, batches, kind)
            return _found(model, sites)
        finally:
            detach(model, NAME)


def _train(model: nn.Module, search: Search, batches: Batches, what: str) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gates = {
        id(p) for _, piece in adapters_of(model).get(NAME).pieces() if isinstance(piece, Gated) for p in piece.gates
    }
    groups = [
        {"params": [p for p in trained if id(p) not in gates], "lr": search.learning_rate},
        {"params": [p for p in trained if id(p) in gates], "lr": GATE_LEARNING_RATE, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / search.steps)
    parts = controllers(model)
    for batch in batches.repeated(model, search.steps, what):
        loss = batches.loss(model, batch)
        for controller in parts:
            extra = controller.extra_loss()
            loss = loss if extra is None else loss + extra
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        falling.step()
        optimizer.zero_grad()


@torch.no_grad()
def _found(model: nn.Module, sites: Sequence[Site]) -> list[Tensor]:
    """By parameter, what its piece makes of it, less what it was."""
    model.eval()
    pieces = {site.name: piece for site, piece in adapters_of(model).get(NAME).pieces()}
    found = []
    for site in sites:
        piece, weight = pieces[site.name], site.weight
        if isinstance(piece, Gated):
            found.append(piece.change().float())
        else:
            found.append(piece.get_parameter("value").float() - weight.float())
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything(CopyMethod):
    """Trains every entry of the named parameters: as copies, or as gated changes where there is a penalty."""

    kind: ClassVar[str] = "search"

    names: tuple[str, ...]
    """The parameters."""
    penalty: float | None = None
    """λ; None: no gates."""

    def sites(self, index: SiteIndex) -> list[Site]:
        wanted = set(self.names)
        return with_tied(index, [site for site in index.parameters() if site.name in wanted])

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        if self.penalty is None:
            return copies(sites)
        gates: dict[int, Gates] = {}
        return [(site, Gated(gates.setdefault(id(site.weight), Gates(site)))) for site in sites]

    def controller(self, pieces: Mapping[str, Piece]) -> Controller | None:
        gates = {id(piece.body): piece.body for piece in pieces.values() if isinstance(piece, Gated)}
        return L0(list(gates.values()), self.penalty) if self.penalty is not None else None


class Gates(nn.Module):
    """w and α in a parameter's shape, and one α for the whole; tied parameters share one."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        start = torch.zeros_like(site.weight, dtype=trainable_dtype(site.dtype), requires_grad=False)
        self.w = nn.Parameter(start)
        self.alpha = nn.Parameter(torch.full_like(start, OPEN))
        self.alpha_whole = nn.Parameter(torch.full_like(start.flatten()[:1], OPEN))


class Gated(Piece):
    """θ + z ⊙ w."""

    def __init__(self, body: Gates) -> None:
        super().__init__()
        self.body = body

    @property
    def gates(self) -> list[nn.Parameter]:
        """The numbers that decide about opening."""
        return [self.body.alpha, self.body.alpha_whole]

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.change()

    def change(self) -> Tensor:
        """z ⊙ w."""
        return self.gate(self.body.alpha) * self.gate(self.body.alpha_whole) * self.body.w

    def gate(self, alpha: Tensor) -> Tensor:
        """z: at random in training, at its middle in evaluation."""
        if self.training:
            u = torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6)
            alpha = torch.logit(u) + alpha
        return (torch.sigmoid(alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


class L0(Controller):
    """Charges λ for each entry whose gate is not closed, in expectation."""

    def __init__(self, bodies: Sequence[Gates], penalty: float) -> None:
        self.bodies = list(bodies)
        self.penalty = penalty

    def extra_loss(self) -> Tensor | None:
        if not self.bodies or not torch.is_grad_enabled():
            return None
        return self.penalty * torch.stack([self.expected(body) for body in self.bodies]).sum()

    def expected(self, body: Gates) -> Tensor:
        """How many entries of a parameter are not zero."""
        return torch.sigmoid(body.alpha - SHIFT).sum() * torch.sigmoid(body.alpha_whole - SHIFT).squeeze()
