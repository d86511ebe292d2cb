"""Shadow: a small trained network beside the model, whose state enters every block (Li et al. 2026, arXiv:2604.19254).

    h ← h + α · U D (h − s)              before a block;  D (r, d), U (d, r)
    s ← (1 − g) ⊙ s + g ⊙ T(h)           after it;  g = σ(G(h)), T and G of one hidden layer of width w

s starts as what a network of the model's own kind, with one layer, makes of the text; U starts at zero, so the model
starts as the base. Where the model computes a loss from labels, λ times the loss of its head on that first s is added.

Parameters: the network's, and 2 r d + 4 w d + 2 w + 2 d a block; the last block, after which nothing reads s, 2 r d.
"""

from __future__ import annotations

import dataclasses

from inlay.pieces.linear import named
from inlay.pieces.shadow.method import ShadowMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shadow(ShadowMethod):
    """h + α · U D (h − s) before each block; s, a small network's output at first, moves with what comes out."""

    kind = "shadow"
    peft_type = "SHADOW"
    paper = "Li et al. 2026, arXiv:2604.19254"

    r: int = named("r", 8)
    """Rank of the correction."""
    alpha: float = named("shadow_alpha", 0.1)
    """α, its strength."""
    dropout: float = named("shadow_dropout", 0.2)
    """Probability of zeroing an entry of h − s, in training."""
    pretrained: str | None = named("shadow_model", None)
    """Folder or hub name of a model to take as the network, its table of tokens frozen; None: a fresh small one."""
    num_hidden_layers: int = named("shadow_num_hidden_layers", 1)
    """Layers of the network."""
    hidden_size: int | None = named("shadow_hidden_size", None)
    """Its width; None: the model's. At another width it has a table of tokens of its own, and a projection."""
    num_attention_heads: int | None = named("shadow_num_attention_heads", None)
    """Its attention heads; None: as many as the model has."""
    intermediate_size: int | None = named("shadow_intermediate_size", None)
    """Width of its feed-forward networks; None: as the model's config has it."""
    share_embeddings: bool = named("share_embeddings", True)
    """Whether it reads the model's frozen embeddings, where it is as wide; otherwise it learns its own."""
    update_hidden_size: int | None = named("update_hidden_size", None)
    """w, the width of T's and G's hidden layer; None: r."""
    auxiliary_loss_weight: float = named("auxiliary_loss_weight", 0.05)
    """λ, the weight of the loss on the first s; 0: none."""
