"""KaSA: knowledge-aware singular-value adaptation (Wang et al. 2024, arXiv:2412.06071).

    W' = W − D + s · B diag(σ) A,     s = alpha / r,     D the part of W of its r smallest singular values

    extra loss    β Σ σ² + γ (‖Bᵀ B − I‖ + ‖A Aᵀ − I‖) at each place

σ (r) is trained beside A and B; D is noise, by the paper. HF peft writes W − D over the base; here D, of rank r, is
subtracted in the piece and the base keeps its bits. B starts at zero, so the model starts as W − D: near the base, not
as the base.

Parameters: r · (in + out + 1) for each linear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from inlay.engine.controller import Controller
from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError, UnsupportedError
from inlay.methods.lora import LoRA
from inlay.pieces.lora.truncated import SingularValuePenalty, TruncatedLoRAPiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class KaSA(LoRA):
    """W' = W − D + s · B diag(σ) A: W without its smallest singular values, and a change with its own."""

    kind = "kasa"
    hosts = frozenset({"linear"})
    peft_variant = "kasa_config"
    paper = "Wang et al. 2024, arXiv:2412.06071"

    beta: float = 1e-4
    """Weight β of Σ σ² in the extra loss."""
    gamma: float = 1e-3
    """Weight γ of the distance of A's rows and B's columns from orthonormal ones in the extra loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init in ("olora", "pissa", "loftq"):
            raise ConfigError(f"KaSA(init={self.init!r}): W is split already; take kaiming, gaussian or orthogonal")
        for name in ("beta", "gamma"):
            if not isinstance(getattr(self, name), int | float) or not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"KaSA({name}={getattr(self, name)!r}): a number of at least 0 is needed")

    def piece(self, site: Site) -> Piece:
        return TruncatedLoRAPiece(self, site)

    def controller(self, pieces: Mapping[str, Piece]) -> Controller:
        found = [piece for piece in pieces.values() if isinstance(piece, TruncatedLoRAPiece)]
        return SingularValuePenalty(found, self.beta, self.gamma)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        if any(site.transposed for site in sites if site.parameter != "bias"):
            raise UnsupportedError("HF peft has no KaSA on transformers' Conv1D")
        return super().to_peft(sites, index) | {self.peft_variant: {"beta": self.beta, "gamma": self.gamma}}

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        known = {name: config[cls.peft_variant].get(name, getattr(cls, name)) for name in ("beta", "gamma")}
        return super().fields_from_peft(config) | known
