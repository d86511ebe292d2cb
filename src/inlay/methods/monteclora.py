"""MonteCLoRA: a LoRA whose A is drawn around its mean in training (Seth et al. 2024, arXiv:2411.04358).

    y = W x + s · B A′ x,     A′ = A + λ Σ_n w_n diag(√v) Z_n,     s = alpha / r,     Z_n ~ N(0, 1)

    extra loss, the mean over the places:    β (KL of w's Dirichlet + KL of v's Wishart + KL of the Z_n's Gaussian)

v (r) is drawn around σ², and the weights w of the N samples around α / Σ α; σ and α are trained. Outside training it is
LoRA, and merges as one. The N samples are drawn as their sum (`kernels.monte_carlo`), which has the same distribution.
HF peft and the authors' code have the wrong sign in the first divergence (`compat="authors"`). B starts at zero, so the
model starts as the base.

Parameters: r · (in + out + 1) + N for each linear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from inlay.engine.controller import Controller
from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError, UnsupportedError
from inlay.methods.lora import LoRA
from inlay.pieces.lora.monte_carlo import MonteCarloLoRAPiece, VariationalLoss

SHARED = ("num_samples", "sample_scaler", "dirichlet_prior", "kl_loss_weight", "use_entropy")
"""What peft's monteclora_config has too, once for all places; its buffer_size is how many draws it keeps in store."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonteCLoRA(LoRA):
    """y = W x + s · B A′ x, with A′ drawn around A in training: a LoRA that its own noise regularises."""

    kind = "monteclora"
    hosts = frozenset({"linear"})
    peft_variant = "monteclora_config"
    paper = "Seth et al. 2024, arXiv:2411.04358"

    num_samples: int = 8
    """Samples N of the mixture."""
    sample_scaler: float = 1e-4
    """Factor λ on the noise."""
    dirichlet_prior: float = 0.1
    """The concentration that α is held to: below 1, a few samples have most of the weight."""
    kl_loss_weight: float = 1e-5
    """Weight β of the divergences in the extra loss."""
    use_entropy: bool = False
    """Add Σ w² to the loss, which is least where all samples weigh the same."""
    compat: Literal["authors"] | None = None
    """ "authors": the Dirichlet's divergence with the sign of their code, and of HF peft's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.num_samples) is not int or self.num_samples < 1:
            raise ConfigError(f"MonteCLoRA(num_samples={self.num_samples!r}): a whole number of at least 1 is needed")
        for name, above in (("sample_scaler", 0), ("kl_loss_weight", 0), ("dirichlet_prior", 1e-30)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not above <= value < float("inf"):
                what = "above 0" if above else "of at least 0"
                raise ConfigError(f"MonteCLoRA({name}={value!r}): a number {what} is needed")
        if self.compat not in (None, "authors"):
            raise ConfigError(f"MonteCLoRA(compat={self.compat!r}): choose None or 'authors'")
        if self.init in ("olora", "pissa"):
            raise ConfigError(f"MonteCLoRA(init={self.init!r}): it has none; leave it out, or use LoRA")

    def piece(self, site: Site) -> Piece:
        return MonteCarloLoRAPiece(self, site)

    def controller(self, pieces: Mapping[str, Piece]) -> Controller:
        return VariationalLoss([one for one in pieces.values() if isinstance(one, MonteCarloLoRAPiece)])

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        entry = {name: getattr(self, name) for name in SHARED}
        if any(getattr(self.at(site), name) != value for site in sites for name, value in entry.items()):
            raise UnsupportedError("HF peft has one monteclora_config for all places")
        return super().to_peft(sites, index) | {self.peft_variant: entry | {"buffer_size": 1}}

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        entry = config[cls.peft_variant]
        return super().fields_from_peft(config) | {name: entry[name] for name in SHARED if name in entry}
