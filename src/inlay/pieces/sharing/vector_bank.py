"""A bank of vectors that all places share, and the logits by which each place mixes its factors out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels import mixtures
from inlay.kernels.choice import without_autocast
from inlay.pieces.projections import Placed, Shared, SharingPiece

TOPK = ("indices", "weights")


class VectorBank(Shared):
    """The bank (h, v), trained."""

    def __init__(self, method: Any, placed: Placed) -> None:
        super().__init__()
        first, bound = placed[0][0], abs(method.init_vector_bank_bound)
        shape, dtype = (method.num_vectors, method.vector_length), trainable_dtype(first.dtype)
        bank = torch.empty(shape, dtype=dtype, device=first.device)
        self.vblora_vector_bank = nn.Parameter(bank.uniform_(-bound, bound))


class VBLoRAPiece(SharingPiece):
    """The logits of A's pieces (r, in / v, h) and of B's (out / v, r, h), by HF peft's names."""

    shared: VectorBank

    def __init__(self, method: Any, site: Site) -> None:
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
