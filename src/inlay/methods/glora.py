"""GLoRA: generalised LoRA (Chavan et al. 2023, arXiv:2306.07967).

    W′ = W + W ⊙ A + B,     b′ = b + b ⊙ D + E + W C

A and B (out, in), C (in), D and E (out) are products of rank r, vectors, numbers or absent; C, D and E only where there
is a bias. W and b on the right are the base's, so that two adapters add up. All start at zero, so the model starts as
the base.

Parameters, by default: 2 r (in + out), and r (in + 1) + 2 with a bias.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.pieces.deltas.supports import GLoRAPiece
from inlay.pieces.linear import LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLoRA(LinearMethod):
    """W + W ⊙ A + B and b + b ⊙ D + E + W C: each entry changes by a share of itself and by an amount."""

    kind = "glora"
    default_targets = "query,value"
    peft_type = "GLORA"
    paper = "Chavan et al. 2023, arXiv:2306.07967"
    peft_constants = (("bias", "none"),)
    peft_conv1d = False

    r: int = named("r", 8)
    """Rank of A, B and C where they are products."""
    weights: Literal["lora", "vector", "constant", "none"] = named("config_A_B", "lora")
    """What A and B are: products of rank r, one number for each output, one number, or absent."""
    coupling: Literal["lora", "vector", "none"] = named("config_C", "lora")
    """What C is: a product of rank r, a vector, or absent."""
    biases: Literal["vector", "constant", "none"] = named("config_D_E", "constant")
    """What D and E are: vectors, one number each, or absent."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        self.check_choice("weights", ("lora", "vector", "constant", "none"))
        self.check_choice("coupling", ("lora", "vector", "none"))
        self.check_choice("biases", ("vector", "constant", "none"))

    def piece(self, site: Site) -> Piece:
        return GLoRAPiece(self, site)
