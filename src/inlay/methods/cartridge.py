"""Cartridge: a text's keys and values, shortened and trained, in place of the text.

Eyuboglu et al. (2025), "Cartridges: Lightweight and general-purpose long context representations via self-study",
arXiv:2506.06266.

    attention(q) = softmax(q [K_f ; K_p ; K]ᵀ / √d) [V_f ; V_p ; V]      f rows frozen (attention sinks), p rows trained
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inlay.engine.piece import Method
from inlay.errors import ConfigError, UnsupportedError
from inlay.methods.prefix_tuning import PrefixTuning

if TYPE_CHECKING:
    from inlay.engine.sites import Site, SiteIndex


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cartridge(PrefixTuning):
    """Prefix tuning whose first rows stay as they are (f: num_frozen_tokens).

    Parameters: (n − f) · Σ over layers of (d_k + d_v) · key-value heads. It is HF peft's CARTRIDGE. Several that are
    active together are what peft composes by writing one behind the other.
    """

    kind = "cartridge"
    peft_type = "CARTRIDGE"
    paper = "Eyuboglu et al. 2025, arXiv:2506.06266"

    num_frozen_tokens: int = 1
    """f, how many of the first rows are not trained: models attend to their first token whatever it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.num_frozen_tokens < self.num_virtual_tokens:
            raise ConfigError(
                f"Cartridge(num_frozen_tokens={self.num_frozen_tokens}): from 0 to {self.num_virtual_tokens - 1}, so "
                "that there is a row to train"
            )
        if self.projection_size is not None:
            raise ConfigError("Cartridge has no projection_size: its keys and values are trained as they are")

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        """peft's CartridgeConfig; UnsupportedError for what it has no fields for."""
        fields = super().to_peft(sites, index)
        del fields["prefix_projection"]
        return {**fields, "num_frozen_tokens": self.num_frozen_tokens}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        """The rows, frozen ones first."""
        if config.get("num_transformer_submodules") == 2:
            raise UnsupportedError("a peft cartridge of an encoder–decoder, whose layers share slots, is not read")
        return [cls(**{name: config[name] for name in ("num_virtual_tokens", "num_frozen_tokens")})]
