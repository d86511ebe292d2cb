"""Edits of hidden states in a subspace of low rank, at the first and the last tokens of a text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.prompts.calls import named
from inlay.engine.prompts.entry import arguments_of
from inlay.engine.sites import Site
from inlay.errors import UnsupportedError
from inlay.kernels.choice import without_autocast
from inlay.kernels.chosen_tokens import Chosen, at, changed, ends
from inlay.pieces.bottlenecks.bottleneck import first_of
from inlay.pieces.real_tokens import real_tokens


def orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal rows of the same span, (r, d): Gram and Schmidt's, from the first row on; the same if they are so."""
    q, r = torch.linalg.qr(matrix.mT)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    rows: Tensor = (q * signs).mT
    return rows


class Edit(nn.Module):
    """Pᵀ(W h + b − P h), or Pᵀ(W h + b) without the difference; P (r, d) orthonormal or as it is."""

    def __init__(self, method: Any, width: int, place: dict[str, Any]) -> None:
        super().__init__()
        r, init = method.r, method.init
        self.orthogonal, self.difference = method.orthogonal, method.difference
        self.projection = nn.Parameter(torch.empty(r, width, **place))
        self.weight = nn.Parameter(torch.empty(r, width, **place))
        self.bias = nn.Parameter(torch.zeros(r, **place))
        with torch.no_grad():
            (nn.init.orthogonal_ if self.orthogonal else nn.init.kaiming_uniform_)(self.projection, 1)
            if init == "authors":
                bound = width**-0.5
                self.weight.uniform_(-bound, bound)
                self.bias.uniform_(-bound, bound)
            elif self.difference:
                self.weight.copy_(self.basis())
            else:
                self.weight.zero_()

    def basis(self) -> Tensor:
        """P."""
        if not self.orthogonal:
            return self.projection
        with without_autocast(self.projection):
            return orthonormal(self.projection.to(torch.promote_types(self.projection.dtype, torch.float32)))

    def forward(self, h: Tensor) -> Tensor:
        basis, weight = self.basis().to(h.dtype), self.weight
        # W − P as a matrix: where the two are equal, as they are at the start, the edit is zero in every bit.
        source = (weight - self.basis() if self.difference else weight).to(h.dtype)
        return F.linear(F.linear(h, source, self.bias.to(h.dtype)), basis.mT)


class EditPiece(Piece):
    """On a block: what comes out of it, edited at the first and the last tokens of the text that it is given first."""

    def __init__(self, method: Any, width: int, site: Site) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": trainable_dtype(site.dtype), "device": site.device}
        self.first, self.last, self.dropout = method.first, method.last, method.dropout
        count = 1 if method.tied or not (self.first and self.last) else 2
        self.edits = nn.ModuleList(Edit(method, width, place) for _ in range(count))
        self.arguments = arguments_of(site.module)
        self.layer = next((m.layer_idx for m in site.module.modules() if hasattr(m, "layer_idx")), None)

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        call = named(self.arguments, args, kwargs)
        cache = call.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length(self.layer)
        past = past.clone() if isinstance(past, Tensor) else past  # what a block does is to lengthen it
        output = inner(*args, **kwargs)
        if isinstance(past, int) and past:  # a token that was generated
            return output
        return first_of(output, lambda h: self.edited(h, real_tokens(call, h.shape[1]), past))

    def edited(self, h: Tensor, real: Tensor | None, past: int | Tensor) -> Tensor:
        """h (B, T, d), edited where the text begins and ends."""
        if h.dim() != 3:
            raise UnsupportedError(f"ReFT needs hidden states (batch, tokens, width), not {tuple(h.shape)}")
        if real is None:
            real = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        real = real & (torch.as_tensor(past, device=h.device) == 0)
        chosen = [one for one in ends(real, self.first, self.last) if one.places.shape[1]]
        for number, one in enumerate(chosen):
            h = self.at_chosen(h, one, self.edits[min(number, len(self.edits) - 1)])
        return h

    def at_chosen(self, h: Tensor, chosen: Chosen, edit: nn.Module) -> Tensor:
        """h with one edit at the chosen tokens."""
        change = F.dropout(edit(at(h, chosen)), self.dropout, self.training)
        return changed(h, chosen, change)
