"""The LoRAs of several adapters at one linear as one: all A under one another, all B side by side, a gate between.

    y[t] = W x[t] + Σ_k g[t, k] · s_k B_k A_k x[t]

Two ways, by size. Wide: one product with all A and one with all B, with the gate on h; n times the FLOPs that a row
needs, in two products whatever n is. Gathered: each row takes its own A and B, in two batched products.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.engine.bank import Bank, repeats
from inlay.engine.piece import Piece
from inlay.errors import UnsupportedError
from inlay.kernels import lora as kernel
from inlay.kernels.choice import compute_dtype

if TYPE_CHECKING:
    from inlay.methods.lora import LoRAPiece

WIDE_SHARE = 1 / 3
"""Up to this share of the input's width, all ranks together go through one product."""


class BankedLoRA(Piece):
    """What stands in a host for the LoRAs of a bank's adapters there."""

    def __init__(self, pieces: Mapping[int, LoRAPiece], bank: Bank) -> None:
        super().__init__()
        self.bank = bank
        self.numbers = tuple(pieces)
        self.of = list(pieces.values())  # not as children: they belong to their adapters
        ranks = torch.tensor([piece.lora_A.shape[0] for piece in self.of])
        columns = torch.tensor(self.numbers).repeat_interleave(ranks)
        self.columns = columns.to(bank.gates.device)
        self._stack: tuple[Any, Tensor, Tensor] | None = None

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rates = {piece.dropout if piece.training else 0.0 for piece in self.of}
        if len(rates) > 1:
            raise UnsupportedError(f"adapters with dropout {sorted(rates)} cannot train in one batch: use equal rates")
        rows = self.bank.rows
        if rows is not None:
            repeated = repeats(x, len(rows))
            if self._gathers(x):
                return self._gathered(inner, x, repeated)
        a, b = self._stacked(compute_dtype(x))
        gate = self.bank.gates[:, self.columns]
        return kernel.adapted(inner, x, a, b, 1.0, rates.pop(), gate)

    def _gathers(self, x: Tensor) -> bool:
        """Whether each row had better take its own matrices: many adapters, rows of several tokens, nothing to drop."""
        equal = len({piece.lora_A.shape[0] for piece in self.of}) == 1 and len(self.of) == len(self.bank.names)
        drops = any(piece.dropout and piece.training for piece in self.of)
        wide = len(self.columns) <= WIDE_SHARE * x.shape[-1]
        return equal and not drops and not wide and x.dim() == 3 and x.shape[1] > 1

    def _gathered(self, inner: Any, x: Tensor, repeated: int) -> Tensor:
        y: Tensor = inner(x)
        dtype, count = compute_dtype(x), len(self.of)
        a, b = self._stacked(dtype)
        index = self.bank.index.clamp(min=0).repeat_interleave(repeated)
        present = (self.bank.index >= 0).to(dtype).repeat_interleave(repeated)[:, None, None]
        own_a = a.view(count, -1, a.shape[1])[index]
        own_b = b.view(b.shape[0], count, -1)[:, index].permute(1, 2, 0)
        h = torch.bmm(x.to(dtype), own_a.transpose(1, 2)) * present
        return torch.baddbmm(y.to(dtype), h, own_b).to(y.dtype)

    def _stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All A (n r, in), and all s B (out, n r); kept, without gradients, until some parameter changes."""
        factors = [tensor for piece in self.of for tensor in (piece.lora_A, piece.lora_B)]
        keeps = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        state = (dtype, *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in factors)) if keeps else None
        if self._stack is not None and keeps and self._stack[0] == state:
            return self._stack[1:]
        a = torch.cat([piece.lora_A for piece in self.of])
        b = torch.cat([piece.scale * piece.lora_B for piece in self.of], dim=1)
        if not keeps:
            return a, b
        self._stack = (state, a.to(dtype), b.to(dtype))
        return self._stack[1:]
