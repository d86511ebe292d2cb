"""One A and B for all places of a tied weight: an embedding E (rows, d) and the head that reads E as its weight.

E′ = E + s · (B A)ᵀ at each of them:        x ↦ E′[x] as a table,  x ↦ E′ x = E x + s · Aᵀ (Bᵀ x) as a head
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from inlay.engine.checkpoint import LOADING
from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import CheckpointError, ConfigError
from inlay.kernels import low_rank
from inlay.pieces.lora.piece import LoRAPiece

PEFT_NAMES = ("embed_tokens", "lm_head")
"""The targets by which HF peft knows that tied weights are meant."""
ROUNDING = 0.1
"""How far the two copies in a file may be apart, of their norm: as far as codes of few bits leave them."""


class TiedLoRAPiece(LoRAPiece):
    """What another place of the tied weight does with the A and B of its `owner`; at a head they change places."""

    shared_A: nn.Parameter
    shared_B: nn.Parameter

    def __init__(self, owner: LoRAPiece, site: Site) -> None:
        nn.Module.__init__(self)
        self.scale, self.dropout, self.exact = owner.scale, owner.dropout, owner.exact
        self.kind, self.shape, self.groups, self.input_last = site.kind, site.weight.shape, 1, True
        self.turned = owner.kind != site.kind
        self.register_parameter("shared_A", owner.lora_A)  # type: ignore[arg-type]
        self.register_parameter("shared_B", owner.lora_B)
        self.register_parameter("lora_bias", None)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """A as this place has it."""
        return self.shared_B.T if self.turned else self.shared_A

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """B as this place has it."""
        return self.shared_A.T if self.turned else self.shared_B

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A, self.lora_B, self.scale

    def weight(self, weight: Tensor) -> Tensor:
        """By the products and in the order of the owner's, so that merged weights are the same bits and stay tied."""
        if not self.turned:
            return super().weight(weight)
        return weight + (self.scale * low_rank.delta(self.shared_A, self.shared_B, self.shape[::-1])).T

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: the owner has loaded. CheckpointError where this place had other values than the owner."""
        for theirs, own in zip(tensors.values(), (self.lora_A, self.lora_B), strict=True):
            if (theirs.to(own) - own).norm() > ROUNDING * own.norm():
                raise CheckpointError(
                    "the file has other values for two places of one tied weight: they came apart in training, as HF "
                    "peft's do when its model is moved; set ensure_weight_tying to false in adapter_config.json"
                )

    def values_of(self, other: Piece) -> list[tuple[Tensor, Tensor]]:
        """None of its own."""
        if type(other) is not type(self):
            raise CheckpointError(f"it is {type(other).__name__}, and {type(self).__name__} here")
        return []


def tied_places(index: SiteIndex) -> list[list[Site]]:
    """The embeddings and linears that share a weight, each weight's together, embeddings first."""
    found: dict[int, list[Site]] = {}
    for site in index.sites:
        if site.kind in ("embedding", "linear") and site.owner is None and site.parameter is None:
            weight = site.module._parameters.get("weight")
            if weight is not None and not site.transposed:
                found.setdefault(id(weight), []).append(site)
    groups = [sorted(sites, key=lambda site: site.kind) for sites in found.values()]
    return [sites for sites in groups if len(sites) > 1]


def chosen_groups(method: Any, index: SiteIndex, sites: Sequence[Site]) -> list[list[Site]]:
    """The tied places of which some are among `sites`. ConfigError where none is, or one of them is left out."""
    everywhere, what = tied_places(index), type(method).__name__
    weights = {id(site.module._parameters.get("weight")) for site in sites if site.parameter is None}
    chosen = [group for group in everywhere if id(group[0].weight) in weights]
    if everywhere and not chosen and not LOADING.get():
        names = " and ".join(site.name for site in everywhere[0])
        raise ConfigError(f"{what}: {names} are tied, and targets={method.targets!r} has neither: use LoRA")
    if method.exclude is not None:
        left = {site.path for site in index.select(None, hosts=method.hosts, exclude=method.exclude, what=what)}
        gone = [site.name for group in chosen for site in group if site.path not in left]
        if gone:
            raise ConfigError(f"{what}(exclude={method.exclude!r}): {gone[0]} is tied to a place that it adapts")
    return chosen


def with_partners(made: Sequence[tuple[Site, Piece]], groups: Sequence[Sequence[Site]]) -> list[tuple[Site, Piece]]:
    """These pieces, and beside that of each group's first place those of its others."""
    others = {id(sites[0]): sites[1:] for sites in groups}
    result: list[tuple[Site, Piece]] = []
    for site, piece in made:
        result.append((site, piece))
        if id(site) in others and isinstance(piece, LoRAPiece):
            result += [(other, TiedLoRAPiece(piece, other)) for other in others[id(site)]]
    return result


# -- in HF peft --------------------------------------------------------------------------------------------------------


def names_one(targets: str | Sequence[str]) -> bool:
    """Whether HF peft would take these targets for ones that tied weights are among."""
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in PEFT_NAMES)
    return any(target.rpartition(".")[2] in PEFT_NAMES for target in targets)


def peft_ties(model: Any, sites: Sequence[Site]) -> bool:
    """Whether HF peft would tie what sits at these sites; elsewhere it says that nothing is tied, and LoRAs serve."""
    declared = getattr(model, "_tied_weights_keys", None) and getattr(model.config, "tie_word_embeddings", True)
    return bool(declared) and names_one([site.path for site in sites])
