"""The LoRAs of several adapters at one linear as one: all A under one another, all B side by side, a gate between.

    y[t] = W x[t] + Σ_k g[t, k] · s_k B_k A_k x[t]

Three ways, by size. Wide: one product with all A and one with all B, with the gate on h; n times the FLOPs that a row
needs, in two products whatever n is. Gathered: each row takes its own A and B, in two batched products. Kept: gathered,
with what the rows took kept for the next call with the same rows, as when a batch is decoded token by token.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.engine.bank import Bank, Layout, repeats
from inlay.engine.piece import Piece
from inlay.errors import UnsupportedError
from inlay.kernels import lora as kernel
from inlay.kernels.choice import compute_dtype

if TYPE_CHECKING:
    from inlay.pieces.lora.piece import LoRAPiece

Pair = tuple[Tensor, Tensor]
State = tuple[Any, ...] | None

WIDE = 128
"""Up to so many adapters times tokens a row, one wide product costs less than gathering."""
FEW_TOKENS = 4
"""Up to so many tokens a row, kept matrices are in fp32: the batched product of half-precision vectors is slower."""
A, B, VERSION = operator.itemgetter("lora_A"), operator.itemgetter("lora_B"), operator.attrgetter("_version")


class BankedLoRA(Piece):
    """What stands in a host for the LoRAs of a bank's adapters there."""

    def __init__(self, pieces: Mapping[int, LoRAPiece], bank: Bank) -> None:
        super().__init__()
        self.bank = bank
        self.of = list(pieces.values())  # not as children: they belong to their adapters
        ranks = tuple(piece.lora_A.shape[0] for piece in self.of)
        self.layout: Layout = tuple(zip(pieces, ranks, strict=True))
        self.alike = len(set(ranks)) == 1
        self.drops = any(piece.dropout for piece in self.of)
        # Where each A and B is found at every call, since it may be replaced. A frozen A is a buffer.
        self._of_a = [p._parameters if "lora_A" in p._parameters else p._buffers for p in self.of]
        self._of_b = [p._parameters for p in self.of]
        self._stack: tuple[Any, Pair] | None = None
        self._own: tuple[Any, Tensor, Pair | None] | None = None

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rate = self._rate() if self.drops else 0.0
        rows, dtype = self.bank.rows, compute_dtype(x)
        state = self._state(dtype)
        if rows is not None:
            repeats(x, len(rows))
            own = None if rate or not self.alike else self._own_of_rows(x, dtype, len(rows), state)
            if own is not None:
                return _batched(inner, x, *own)
        a, b = self._stacked(dtype, state)
        return kernel.adapted(inner, x, a, b.t(), 1.0, rate, self.bank.gate(self.layout, x, dtype))

    def _rate(self) -> float:
        rates = {piece.dropout if piece.training else 0.0 for piece in self.of}
        if len(rates) > 1:
            raise UnsupportedError(f"adapters with dropout {sorted(rates)} cannot train in one batch: use equal rates")
        return rates.pop()

    def _own_of_rows(self, x: Tensor, dtype: torch.dtype, rows: int, state: State) -> Pair | None:
        """Each row's A (rows, r, in) and s Bᵀ (rows, r, out); None where the wide way costs less."""
        tokens = x.numel() // (rows * x.shape[-1])
        wide = len(self.of) * tokens <= WIDE
        if state is None or rows > 2 * len(self.of):  # kept, they would take more than twice the memory of the stack
            return None if wide else self._gathered(dtype, dtype, state)
        few = tokens <= FEW_TOKENS and x.device.type == "cpu" and x.dtype == dtype != torch.float64
        kept, index, known = torch.float32 if few else dtype, self.bank.index, self._own
        if known is None or known[0] != (few, state) or known[1] is not index:
            known = (few, state), index, None if wide else self._gathered(dtype, kept, state)
        elif known[2] is None:  # the same rows for the second time: there may well be a third
            known = *known[:2], self._gathered(dtype, kept, state)
        self._own = known
        return known[2]

    def _gathered(self, dtype: torch.dtype, kept: torch.dtype, state: State) -> Pair:
        stacked = self._stacked(dtype, state)
        place, here = (t.to(stacked[0].device) for t in self.bank.places(self.layout))
        a, b = (t.view(len(self.of), -1, t.shape[1]).index_select(0, place).to(kept) for t in stacked)
        return a, b * here.to(kept)

    def _stacked(self, dtype: torch.dtype, state: State) -> Pair:
        """All A (n r, in), and all s Bᵀ (n r, out); kept, without gradients, until some parameter changes."""
        if state is not None and self._stack is not None and self._stack[0] == state:
            return self._stack[1]
        a = torch.cat([piece.lora_A for piece in self.of])
        b = torch.cat([piece.scale * piece.lora_B.t() for piece in self.of])
        if state is None:
            return a, b
        self._stack = state, (a.to(dtype), b.to(dtype))
        return self._stack[1]

    def _state(self, dtype: torch.dtype) -> State:
        """What tells whether kept matrices still hold; None where nothing is kept."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        factors = [*map(A, self._of_a), *map(B, self._of_b)]
        try:
            return dtype, *map(Tensor.data_ptr, factors), *map(VERSION, factors)
        except RuntimeError:  # made in inference mode: no version tells of a change
            return None


def _batched(inner: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """inner(x) + x Aᵀ B for each row's A (rows, r, in) and B (rows, r, out)."""
    y: Tensor
    base = None if torch.is_grad_enabled() else inner.linear()
    if base is None or base.decode is not None or not kernel.suits(base, x, x.dtype):
        y, fresh = inner(x), False
    else:
        y, fresh = kernel.base_product(x, base.weight, base.bias), True
    tokens = x.numel() // (a.shape[0] * x.shape[-1])
    h = torch.bmm(x.reshape(a.shape[0], tokens, x.shape[-1]).to(a.dtype), a.transpose(1, 2))
    rows = y.reshape(a.shape[0], tokens, y.shape[-1])
    if fresh and y.dtype == b.dtype:
        rows.baddbmm_(h, b)
        return y
    if fresh:
        rows.add_(torch.bmm(h, b))
        return y
    return torch.baddbmm(rows.to(b.dtype), h, b).to(y.dtype).view(y.shape)
