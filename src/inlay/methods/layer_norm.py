"""LayerNorm tuning: only the gains and biases of normalisation layers are trained (Zhao et al. 2023, arXiv:2312.11420).

    y = γ' ⊙ (x − μ) / σ + β'        γ', β' start as the base's own

Any normalisation with parameters: LayerNorm, RMSNorm, BatchNorm, GroupNorm. The base's γ and β stay as they are.

Parameters: the size of every chosen norm; 2 · hidden for a LayerNorm, hidden for an RMSNorm. BERT-base: 25 · 2 · 768.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from inlay.engine.peft_names import peft_targets, targets_from_peft
from inlay.engine.piece import Method
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.trained_copy import CopyMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNormTuning(CopyMethod):
    """Train the gains and biases of normalisation layers, and nothing else."""

    kind = "layer_norm"
    hosts = frozenset({"norm"})
    default_targets = "norm"
    peft_type = "LN_TUNING"
    paper = "Zhao et al. 2023, arXiv:2312.11420"

    def sites(self, index: SiteIndex) -> list[Site]:
        norms = {site.path for site in super().sites(index)}
        return [site for site in index.parameters() if site.path in norms]

    def file_key(self, site: Site, name: str) -> str:
        return f"base_model.model.{site.path}.ln_tuning_layers.{site.parameter}"

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        norms = {site.path for site in sites}
        return peft_targets([site for site in index.sites if site.path in norms], index)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        return [cls(**targets_from_peft(config))]
