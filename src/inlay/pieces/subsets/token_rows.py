"""Trained rows of an embedding, or of the head tied to it, for chosen tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError

DELTA = "trainable_tokens_delta"  # HF peft's name; the tensor holds the new rows, not a difference


class TokenRows(Piece):
    """The new rows (ids, width) at an embedding, or at a linear that is tied to one."""

    token_indices: Tensor
    order: Tensor

    def __init__(self, method: Any, site: Site, tied_to: TokenRows | None = None) -> None:
        super().__init__()
        weight = site.weight.detach()
        self.kind = site.kind
        self.rides = False
        self.owner = tied_to is None
        ids = torch.tensor(list(method.token_indices), device=weight.device)
        if int(max(method.token_indices)) >= weight.shape[0]:
            raise ConfigError(
                f"TrainableTokens: there is no token {max(method.token_indices)} in {site.name}, which has "
                f"{weight.shape[0]} rows; resize the embedding before attaching"
            )
        rows = tied_to.value if tied_to else nn.Parameter(weight[ids].to(trainable_dtype(weight.dtype)))
        self.value: nn.Parameter = rows
        self.register_buffer("token_indices", ids, persistent=False)
        self.register_buffer("order", ids.argsort(), persistent=False)
        if site.kind == "embedding":
            _check_lookup(site)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = inner(x, *args, **kwargs)
        if self.kind == "linear":
            # Written as a change of y, so that rows which are still the base's leave y's bits alone.
            change = self.value - inner.weight()[self.token_indices].to(self.value.dtype)
            return y.index_add(-1, self.token_indices, F.linear(x, change.to(x.dtype)).to(y.dtype))
        place = torch.searchsorted(self.token_indices[self.order], x).clamp(max=self.order.numel() - 1)
        place = self.order[place]
        rows = F.embedding(place, self.value).to(inner.inlays.original("weight").dtype)
        scale = getattr(inner.module, "embed_scale", None)
        if scale is not None:
            rows = rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((self.token_indices[place] == x).unsqueeze(-1), rows.to(y.dtype), y)

    def weight(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.token_indices, self.value.to(weight.dtype))

    def file_tensors(self) -> dict[str, Tensor]:
        if not self.rides:
            return {DELTA: self.value}
        return {f"token_adapter.{DELTA}": self.value} if self.owner else {}


def _check_lookup(site: Site) -> None:
    """Refuse embeddings whose rows leave them changed in a way that is not known here, or that rewrite their table."""
    from inlay.engine.host import base_class

    module: Any = site.module
    plain = base_class(type(module)).forward is nn.Embedding.forward
    if module.max_norm is not None or not (plain or hasattr(module, "embed_scale")):
        reason = "renormalises its table (max_norm)" if module.max_norm is not None else "has a forward of its own"
        name = f"{site.name}: {type(module).__name__} {reason}"
        raise UnsupportedError(f"TrainableTokens cannot sit at {name}; use LoRA there")
