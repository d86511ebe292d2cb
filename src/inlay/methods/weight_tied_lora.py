"""LoRA that keeps tied weights tied: an embedding and the head that reads its table have one A and one B.

    E′ = E + s · (B A)ᵀ  for the table and for the head: the logits are E′ h,      s = alpha / r

HF peft's `ensure_weight_tying`. Everywhere else it is LoRA (Hu et al. 2021, arXiv:2106.09685). Not Tied-LoRA
(Renduchintala et al. 2023, arXiv:2311.09578), in which blocks share A and B.

Parameters: r · (in + out) for each weight, once where it is tied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from inlay.engine.piece import Piece
from inlay.engine.registry import all_methods
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError
from inlay.methods.lora import LoRA
from inlay.pieces.lora.tied import chosen_groups, names_one, peft_ties, with_partners


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightTiedLoRA(LoRA):
    """y = W x + s · B (A x), and one A and B for an embedding and the head that is tied to it."""

    kind = "weight_tied_lora"
    default_targets = "query,value,embed"
    peft_variant = "ensure_weight_tying"
    paper = "HF peft, `ensure_weight_tying`"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_a or self.lora_bias:
            name = "freeze_a" if self.freeze_a else "lora_bias"
            raise ConfigError(f"WeightTiedLoRA({name}=True): a table and a head have no such thing together; use LoRA")

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        chosen = chosen_groups(self, SiteIndex(model), sites)
        paths = {site.path for group in chosen for site in group}
        single = [site for site in sites if site.parameter is not None or site.path not in paths]
        return with_partners(super().build(model, [*(group[0] for group in chosen), *single]), chosen)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        return super().to_peft(sites, index) | {self.peft_variant: peft_ties(index.model, sites)}

    @classmethod
    def is_variant(cls, config: Mapping[str, Any]) -> bool:
        # peft writes the flag whatever it adapts, and names the table alone. Other variants do without ties here.
        others = (one for one in all_methods() if issubclass(one, LoRA) and one is not cls)
        alone = not any(one.is_variant(config) for one in others)
        return bool(config.get(cls.peft_variant)) and (alone or names_one(config.get("target_modules") or ()))
