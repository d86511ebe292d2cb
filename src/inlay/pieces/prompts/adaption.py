"""A prompt beside the text inside an attention, with a gate that starts at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import trainable_dtype
from inlay.engine.prompts.attention import AttentionPiece, Beside
from inlay.engine.prompts.attention_sites import key_value_shape
from inlay.errors import UnsupportedError

if TYPE_CHECKING:
    from inlay.engine.sites import Site, SiteIndex


class AdaptionAttention(AttentionPiece):
    """Adds g · softmax(q K_pᵀ / √d) V_p, where K_p and V_p are the attention's own projections of a prompt P (n, d)."""

    def __init__(self, site: Site, index: SiteIndex, length: int, projected: bool) -> None:
        super().__init__(site.module)
        self._projections = projections(site, index)  # a tuple hides the base's modules from registration
        self._shape = key_value_shape(site, index)
        self.projected = projected
        dtype, device = trainable_dtype(site.dtype), site.device
        prompt = torch.randn(1, length, projection_width(self._projections[0]))
        self.adaption_prompt = nn.Parameter(prompt.to(device, dtype))
        self.adaption_gate = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        keys, values = self.keys_and_values(hidden.dtype)
        beside = Beside(keys, values, self.adaption_gate, outside=not self.projected)
        output = self.show(inner, beside, args, kwargs)
        if beside.added is None:
            return output
        return (output[0] + beside.added, *output[1:])

    def keys_and_values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(1, heads, n, d_k) and (1, heads, n, d_v)."""
        prompt = self.adaption_prompt.to(dtype)
        heads, key_size, value_size = self._shape
        first, *second = self._projections
        keys, values = (first(prompt), second[0](prompt)) if second else first(prompt).chunk(3, dim=-1)[1:]
        n = prompt.shape[1]
        return keys.view(1, n, heads, key_size).transpose(1, 2), values.view(1, n, heads, value_size).transpose(1, 2)


def projections(site: Site, index: SiteIndex) -> tuple[nn.Module, ...]:
    """What computes the keys and the values of an attention: two linears, or GPT-2's one for queries too.

    Raises UnsupportedError where the attention does more to them than to project.
    """
    inside = [one for one in index.sites if one.path.startswith(f"{site.path}.") and one.parameter is None]
    linears = [one for one in inside if one.kind == "linear"]
    fused = [one.module for one in linears if "qkv" in one.roles and one.transposed]
    if fused:
        return (fused[0],)
    found = []
    for role in ("key", "value"):
        found += [one.module for one in linears if role in one.roles and not {"qkv", "kv"} & one.roles][:1]
    if len(found) != 2 or any(one.kind == "norm" for one in inside):
        raise UnsupportedError(
            f"AdaptionPrompt needs an attention that projects keys and values and no more, and "
            f"{site.path} ({type(site.module).__name__}) does otherwise: use prefix tuning"
        )
    return tuple(found)


def projection_width(module: Any) -> int:
    """What a linear, or transformers' Conv1D, takes in."""
    return int(module.in_features if isinstance(module, nn.Linear) else module.nx)
