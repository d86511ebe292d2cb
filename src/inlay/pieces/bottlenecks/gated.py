"""LoRA, a bottleneck and a prefix, each multiplied by a gate that a text opens for itself."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.prompts.attention import ARGUMENT, PrefixAttention
from inlay.engine.sites import Site
from inlay.pieces.bottlenecks.bottleneck import Bottleneck
from inlay.pieces.real_tokens import Gate, Real


def place_of(site: Site) -> dict[str, Any]:
    """Where a site's new parameters live, and their dtype."""
    return {"dtype": trainable_dtype(site.dtype), "device": site.device}


class GatedLoRA(Piece):
    """W x + g(x) · B A x̃, x̃ with dropout: the gate stands where LoRA has its scale."""

    def __init__(self, r: int, dropout: float, site: Site, real: Real | None) -> None:
        super().__init__()
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(r, site.in_features, **place_of(site)))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_B = nn.Parameter(torch.zeros(site.out_features, r, **place_of(site)))
        self.gate = Gate(site.in_features, real, place_of(site))

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training and self.dropout:
            narrow, gate = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype)), self.gate(x)
        else:  # A and w in one product, since x is read for it once
            both = F.linear(x, torch.cat((self.lora_A, self.gate.weight[None])).to(x.dtype))
            narrow, gate = both[..., :-1], self.gate.opened(both[..., -1])
        y = inner(x, *args, **kwargs)
        return y + F.linear(gate * narrow, self.lora_B.to(x.dtype)).to(y.dtype)


class GatedBottleneck(Bottleneck):
    """g(x) · A(x)."""

    def __init__(self, into: int, width: int, out: int, method: Any, site: Site, real: Real | None) -> None:
        super().__init__(into, width, out, method, site)
        self.gate = Gate(into, real, place_of(site))

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(x)
        return gate * super().forward(x)


class GatedPrefix(PrefixAttention):
    """A prefix whose keys and values are g(x) K_p and g(x) V_p, x what goes into the attention."""

    def __init__(
        self,
        source: nn.Module,
        length: int,
        shape: tuple[int, int, int],
        attention: Any,
        bias: nn.Module | None,
        gate: Gate,
    ) -> None:
        super().__init__(source, length, shape, attention, bias)
        self.gate = gate

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        gate = self.gate(args[0] if args else kwargs["hidden_states"]).unsqueeze(-1)

        def gated(*args: Any, **kwargs: Any) -> Any:
            shown = kwargs[ARGUMENT][0]
            shown.key, shown.value = gate * shown.key, gate * shown.value
            return inner(*args, **kwargs)

        return super().forward(gated, *args, **kwargs)
