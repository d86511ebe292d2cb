"""MiCA: minor component adaptation (Rüdiger, Raschka 2026, arXiv:2604.01694).

    ΔW = s · B A,     s = alpha / r,     B (out, r) the left singular vectors of W of its r smallest singular values

B is frozen, and only A (r, in) is trained: the change writes into the directions that W uses least. A starts at zero,
so the model starts as the base. For an embedding the table counts as W transposed: B (dim, r), A (r, vocabulary).

Parameters: r · in for each linear, r · vocabulary for an embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.engine.checkpoint import LOADING
from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError, UnsupportedError
from inlay.methods.lora import LoRA
from inlay.pieces.lora.piece import LoRAPiece
from inlay.pieces.lora.start import factored


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiCA(LoRA):
    """ΔW = s · B A with B frozen: the directions that W uses least."""

    kind = "mica"
    hosts = frozenset({"linear", "embedding"})
    peft_variant = "init_lora_weights"
    paper = "Rüdiger, Raschka 2026, arXiv:2604.01694"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "kaiming" or self.freeze_a:
            field = f"init={self.init!r}" if self.init != "kaiming" else "freeze_a=True"
            raise ConfigError(f"MiCA({field}): its A starts at zero and is what it trains; leave it out, or use LoRA")

    def piece(self, site: Site) -> Piece:
        return MiCAPiece(self, site)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        if self.lora_bias:
            raise UnsupportedError("HF peft has no MiCA with a bias on B")
        return super().to_peft(sites, index) | {self.peft_variant: "mica"}

    @classmethod
    def is_variant(cls, config: Mapping[str, Any]) -> bool:
        return str(config.get(cls.peft_variant)).lower() == "mica"


class MiCAPiece(LoRAPiece):
    """`LoRAPiece` with a frozen B."""

    def __init__(self, method: MiCA, site: Site) -> None:
        super().__init__(method, site)
        b = self.lora_B.detach()
        if not LOADING.get():
            least = factored(site, method.r, "MiCA")[0][:, -method.r :]
            largest = least.gather(0, least.abs().argmax(0, keepdim=True))
            b = (least * largest.sign()).to(b.dtype).contiguous()  # of either sign of a vector, always the same one
            torch.nn.init.zeros_(self.lora_A)
        del self.lora_B
        self.register_buffer("lora_B", b)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.lora_bias is not None else (self.lora_A, self.lora_B, self.scale)
