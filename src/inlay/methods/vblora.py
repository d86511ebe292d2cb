"""VB-LoRA: LoRA put together from a bank of vectors that all places share (Li et al. 2024, arXiv:2405.15179).

    ΔW = B A,     each piece of v entries of A's rows and B's columns = Σ_j softmax(top-k(l))_j · bank[j]

Each piece has logits l (h) of its own over the bank (h, v); the k largest count, and change in training. The bank
starts small and random, the logits random, so the model starts near the base, not as it.

Parameters: r h (in + out) / v for each place, and h v once.
"""

from __future__ import annotations

import dataclasses

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.pieces.linear import named
from inlay.pieces.projections import Placed, Shared, SharingMethod
from inlay.pieces.sharing.vector_bank import VBLoRAPiece, VectorBank


@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRA(SharingMethod):
    """ΔW = B A, where A and B are mixtures of a few vectors out of one bank for the whole model."""

    kind = "vblora"
    default_targets = "query,value"
    peft_type = "VBLORA"
    paper = "Li et al. 2024, arXiv:2405.15179"
    peft_constants = (("bias", "none"),)
    common = frozenset({"r", "num_vectors", "vector_length", "topk", "save_only_topk_weights"})

    r: int = named("r", 4)
    """Rank of the change."""
    num_vectors: int = named("num_vectors", 256)
    """Vectors in the bank, h."""
    vector_length: int = named("vector_length", 256)
    """Their length v, which has to divide both sides of every weight."""
    topk: int = named("topk", 2)
    """How many vectors each piece is a mixture of."""
    dropout: float = named("vblora_dropout", 0.0)
    """Probability of zeroing an entry of x before A, in training."""
    init_vector_bank_bound: float = named("init_vector_bank_bound", 0.02)
    """The bank starts uniformly in ± this."""
    init_logits_std: float = named("init_logits_std", 0.1)
    """Standard deviation of the logits at the start."""
    save_only_topk_weights: bool = named("save_only_topk_weights", False)
    """Write which vectors are mixed and how much of each instead of all logits: tiny, but the choice is final then."""

    def __post_init__(self) -> None:
        self.check_whole("r", "num_vectors", "vector_length", "topk")
        self.check_number("init_vector_bank_bound", "init_logits_std")
        self.check_rate("dropout")
        if self.topk > self.num_vectors:
            raise ConfigError(f"VBLoRA(topk={self.topk}): the bank has num_vectors={self.num_vectors} vectors only")

    def piece(self, site: Site) -> Piece:
        return VBLoRAPiece(self, site)

    def share(self, placed: Placed) -> Shared:
        return VectorBank(self, placed)
