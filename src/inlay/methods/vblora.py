"""VB-LoRA: LoRA put together from a bank of vectors that all places share (Li et al. 2024, arXiv:2405.15179).

    ΔW = B A,     each piece of v entries of A's rows and B's columns = Σ_j softmax(top-k(l))_j · bank[j]

Each piece has logits l (h) of its own over the bank (h, v); the k largest count, and change in training. The bank
starts small and random, the logits random, so the model starts near the base, not as it.

Parameters: r h (in + out) / v for each place, and h v once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels import mixtures
from inlay.kernels.choice import without_autocast
from inlay.pieces.linear import named
from inlay.pieces.projections import Placed, Shared, SharingMethod, SharingPiece

TOPK = ("indices", "weights")


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


class VectorBank(Shared):
    """The bank (h, v), trained."""

    def __init__(self, method: VBLoRA, placed: Placed) -> None:
        super().__init__()
        first, bound = placed[0][0], abs(method.init_vector_bank_bound)
        shape, dtype = (method.num_vectors, method.vector_length), trainable_dtype(first.dtype)
        bank = torch.empty(shape, dtype=dtype, device=first.device)
        self.vblora_vector_bank = nn.Parameter(bank.uniform_(-bound, bound))


class VBLoRAPiece(SharingPiece):
    """The logits of A's pieces (r, in / v, h) and of B's (out / v, r, h), by HF peft's names."""

    shared: VectorBank

    def __init__(self, method: VBLoRA, site: Site) -> None:
        super().__init__(method, site)
        (out, width), r, v, h = self.shape, method.r, method.vector_length, method.num_vectors
        if out % v or width % v:
            raise ConfigError(f"VBLoRA(vector_length={v}) cannot sit at {site.name}: {out} x {width} does not divide")
        self.topk, self.final = method.topk, method.save_only_topk_weights
        self.vblora_logits_A = nn.Parameter(torch.empty(r, width // v, h, **self.place))
        self.vblora_logits_B = nn.Parameter(torch.empty(out // v, r, h, **self.place))
        for logits in self.parameters():
            nn.init.normal_(logits, std=abs(method.init_logits_std))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        (out, width), a, b = self.shape, self.vblora_logits_A, self.vblora_logits_B
        bank = self.shared.vblora_vector_bank.to(a.device)
        with without_autocast(bank):
            pieces = mixtures.mixed(torch.cat((a.flatten(0, 1), b.flatten(0, 1))), bank, self.topk)
        first, second = pieces.tensor_split([a.shape[0] * a.shape[1]])
        columns = second.view(*b.shape[:2], -1).transpose(1, 2).reshape(out, -1)
        return first.reshape(-1, width), columns, 1.0

    def file_tensors(self) -> dict[str, Tensor]:
        whole = super().file_tensors()
        if not self.final:
            return whole
        pairs = {name: mixtures.to_weights(logits.detach(), self.topk) for name, logits in whole.items()}
        return {f"{name}_topk_{what}": t for name, pair in pairs.items() for what, t in zip(TOPK, pair, strict=True)}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.final:
            super().load_file_tensors(tensors)
            return
        for name, logits in super().file_tensors().items():
            which, weights = (tensors[f"{name}_topk_{what}"] for what in TOPK)
            with torch.no_grad():
                logits.copy_(mixtures.to_logits(which, weights.float(), logits.shape[-1]))
