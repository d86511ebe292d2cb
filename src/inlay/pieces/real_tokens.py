"""Which tokens of a text are real and which are padding, as a block learns it: from the attention mask it is given.

A mask says which keys each query sees, and nobody sees padding; a call without a mask has none. What one block learns
is told to the places inside it while the call lasts, so that a block that is recomputed computes the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.prompts.calls import named
from inlay.engine.prompts.entry import arguments_of

MASKS = ("attention_mask", "mask")


def real_tokens(call: dict[str, Any], length: int) -> Tensor | None:
    """(B, T), true where a token is real; None where all are. `call`: a block's arguments, of a text of T tokens."""
    padding = call.get("src_key_padding_mask")
    if isinstance(padding, Tensor):  # torch's own blocks: true, or -inf, where there is padding
        return padding.logical_not() if padding.dtype == torch.bool else padding.eq(0)
    mask: Tensor | None = next((call[name] for name in MASKS if isinstance(call.get(name), Tensor)), None)
    if mask is None:
        return None
    if mask.dim() == 2:
        return mask[:, :length] != 0
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    return seen.flatten(1, -2).any(1)[:, :length]


class Real:
    """What a block tells the places inside it: which tokens are real, (B, T), or None where all are."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None


class TellsReal(Piece):
    """On a block: learns which tokens are real, and forgets it at the end of the call."""

    def __init__(self, real: Real, block: nn.Module) -> None:
        super().__init__()
        self.real = real
        self.arguments = arguments_of(block)

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        call = named(self.arguments, args, kwargs)
        self.real.mask = real_tokens(call, call[self.arguments[0]].shape[1])
        try:
            return inner(*args, **kwargs)
        finally:
            self.real.mask = None


def mean_over_text(x: Tensor, real: Real | None) -> Tensor:
    """The mean of x (B, T, n) over real tokens, (B, 1, n); x itself where there are no texts in it."""
    if x.dim() < 3:
        return x
    if real is None or real.mask is None:
        return x.mean(1, keepdim=True)
    weight = real.mask.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


class Gate(nn.Module):
    """σ(w · x + b), averaged over the real tokens of each text: (B, 1, …, 1). Starts at about one half."""

    def __init__(self, width: int, real: Real | None, place: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, **place).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(1, **place))
        self.real = real

    def forward(self, x: Tensor) -> Tensor:
        return self.opened(x @ self.weight.to(x.dtype))

    def opened(self, products: Tensor) -> Tensor:
        """The gate from w · x, (B, …, T)."""
        gate = torch.sigmoid(products + self.bias.to(products.dtype)).unsqueeze(-1)
        return mean_over_text(gate, self.real)
