"""APET: arbitrary few parameters (Su et al. 2023, arXiv:2306.02320): a number of them, anywhere, drawn by chance.

    θ′ = θ + S,     S nonzero at n entries, or in whole tensors of n entries at most, drawn at random

The paper asks whether it matters where the trained parameters are, and draws them from all of the model's: by its
definition single entries, in its code whole tensors, in random order as long as they fit. S starts at zero, so the
model starts as the base.

Parameters: exactly n (element); at most n, and short of it by less than any tensor left out (tensor).

`compat="authors"` draws what their code does: half of n from the pairs A, B of a LoRA on query and value, half from the
base's tensors. It stands for two methods, that subset and a LoRA at the places drawn.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from inlay.engine.piece import Method
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError
from inlay.methods.lora import LoRA
from inlay.pieces.subsets.drawn_tensors import drawn
from inlay.pieces.subsets.selection import Choice, base_of
from inlay.pieces.subsets.sparse import SparseMethod
from inlay.pieces.subsets.subset import Subset


@dataclasses.dataclass(frozen=True, kw_only=True)
class APET(SparseMethod):
    """θ + S with S at n entries drawn from the whole model, or in tensors drawn until n is used up."""

    kind = "apet"
    peft_type = None
    paper = "Su et al. 2023, arXiv:2306.02320"

    budget: float | int = 0.005
    """n: how many entries (a whole number), or their share of all entries of the targets."""
    granularity: str = "element"
    """What is drawn: element, or tensor as in the authors' code."""
    seed: int = 0
    """Of the drawing."""
    compat: Literal["authors"] | None = None
    """authors: whole tensors, half of n from the base's and half from LoRA's, drawn as their code draws them."""
    r: int = 8
    """With compat: rank of the LoRA that is drawn from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choice(())
        if self.compat not in (None, "authors"):
            raise ConfigError(f"APET(compat={self.compat!r}): leave it out, or say 'authors'")
        if self.compat is None and self.r != 8:
            raise ConfigError(f"APET(r={self.r}): r is the rank of the LoRA that compat='authors' draws from")
        if self.compat and (self.subset is not None or not isinstance(self.budget, int)):
            raise ConfigError("APET(compat='authors') draws by itself, to a budget that is a number of entries")

    def choice(self, sites: Sequence[Site]) -> Choice:
        return Choice(
            budget=self.budget, score="random", granularity=self.granularity, seed=self.seed, what=type(self).__name__
        )

    @property
    def wants_data(self) -> bool:
        return super().wants_data and self.compat is None

    def parts(self, index: SiteIndex) -> list[Method]:
        if self.compat is None:
            return [self]
        lora, sites = LoRA(r=self.r, layers=self.layers), self._candidates(index)
        places = lora.sites(index)
        groups = [(self.r * site.in_features, self.r * site.out_features) for site in places]
        assert isinstance(self.budget, int)
        pairs, tensors = drawn(groups, [site.weight.numel() for site in sites], self.budget, self.seed)
        if not pairs and not tensors:
            raise ConfigError(f"APET(budget={self.budget}): no tensor is within half of it; raise it")
        made = {**dataclasses.asdict(self.choice(())), "granularity": "tensor"}
        del made["what"]
        shapes = {sites[number].name: tuple(sites[number].weight.shape) for number in tensors}
        subset = Subset(dict.fromkeys(shapes), shapes, base_of(index.model), made)
        base = self.replace(subset=subset, compat=None, r=8, targets=None, exclude=None, layers=None)
        paths = "|".join(re.escape(places[number].path) for number in pairs)
        return ([base] if tensors else []) + ([lora.replace(targets=(f"re:{paths}",), layers=None)] if pairs else [])
