"""The product of two thin matrices, applied to activations or formed as a weight: B·A for every kind of host.

Shapes, with r the rank (E experts, k… kernel sizes, g groups):

    host            A                   B
    linear          (r, in)             (out, r)
    embedding       (r, vocabulary)     (dim, r)
    convolution     (r, in/g, k…)       (out, r/g, 1…)      or A (r, in, k…), each rank reading all groups
    2-D parameter   (r, in)             (out, r)
    3-D parameter   (r·E, in)           (out, r·E)      expert index slowest in A, fastest in B
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def linear(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, gate: Tensor | None = None) -> Tensor:
    """(g ⊙ x Aᵀ) Bᵀ for x (rows, …, in): (rows, …, out), in the dtype of x; the gate g is (rows or 1, r)."""
    h = F.linear(x, a.to(x.dtype))
    if gate is not None:
        h = h * gate.to(x.dtype).view(-1, *[1] * (h.dim() - 2), h.shape[-1])
    return F.linear(h, b.to(x.dtype), None if bias is None else bias.to(x.dtype))


def embedding(ids: Tensor, a: Tensor, b: Tensor, host: nn.Embedding) -> Tensor:
    """Aᵀ[ids] Bᵀ: what B·A adds to the rows that `ids` pick, times the host's `embed_scale` where it has one."""
    rows = F.embedding(ids, a.T, host.padding_idx, host.max_norm, host.norm_type, host.scale_grad_by_freq, host.sparse)
    return scaled_rows(F.linear(rows, b), host)


def scaled_rows(rows: Tensor, host: nn.Module) -> Tensor:
    """Rows (…, dim) times the `embed_scale` of an embedding that has one."""
    scale = getattr(host, "embed_scale", None)
    if isinstance(scale, Tensor):  # transformers rounds it to the dtype of the table
        scale = scale.to(host._parameters["weight"].dtype)  # type: ignore[union-attr]
    return rows if scale is None else rows * scale


def convolution(x: Tensor, a: Tensor, b: Tensor, host: nn.Module, bias: Tensor | None = None) -> Tensor:
    """The host's own convolution with A (its stride, padding, dilation, groups), then a 1×1 convolution with B."""
    convolve = CONVOLUTIONS[a.dim()]
    mode = getattr(host, "padding_mode", "zeros")
    padding: Any = host.padding
    if mode != "zeros":
        x = F.pad(x, host._reversed_padding_repeated_twice, mode=mode)  # type: ignore[arg-type]
        padding = 0
    groups: Any = 1 if a.shape[1] == host.in_channels else host.groups
    hidden = convolve(x, a.to(x.dtype), None, host.stride, padding, host.dilation, groups)
    return convolve(  # type: ignore[no-any-return]
        hidden, b.to(x.dtype), None if bias is None else bias.to(x.dtype), groups=host.groups
    )


def spread_groups(a: Tensor, groups: int) -> Tensor:
    """A (r, in/g, k…) of a grouped convolution as (r, in, k…), zero wherever a rank would read another group."""
    rank, channels = a.shape[0] // groups, a.shape[1]
    full = a.new_zeros(groups, rank, groups, channels, *a.shape[2:])
    for group, part in enumerate(a.reshape(groups, rank, *a.shape[1:])):
        full[group, :, group] = part
    return full.reshape(a.shape[0], groups * channels, *a.shape[2:])


def gather_groups(a: Tensor, groups: int) -> Tensor | None:
    """What `spread_groups` spread; None when some rank does read another group."""
    rank, channels = a.shape[0] // groups, a.shape[1] // groups
    blocks = a.reshape(groups, rank, groups, channels, *a.shape[2:])
    grouped = torch.stack([blocks[group, :, group] for group in range(groups)]).reshape(-1, channels, *a.shape[2:])
    return grouped if torch.equal(spread_groups(grouped, groups), a) else None


def delta(a: Tensor, b: Tensor, shape: torch.Size, *, input_last: bool = True) -> Tensor:
    """B·A as a change of a weight of this shape; `input_last` is False for 3-D parameters stored (E, in, out)."""
    if a.dim() > 2:
        return _convolution_delta(a, b)
    if len(shape) < 3:
        return b @ a
    experts = shape[0]
    rank = a.shape[0] // experts
    stacked_a = a.reshape(experts, rank, a.shape[1])
    stacked_b = b.reshape(b.shape[0], rank, experts)
    return torch.einsum("ore,eri->eoi" if input_last else "ore,eri->eio", stacked_b, stacked_a)


def _convolution_delta(a: Tensor, b: Tensor) -> Tensor:
    """(out, in/g, k…): for each group, the 1×1 kernel B composed with the kernel A."""
    out, rank = b.shape[0], b.shape[1]
    groups = a.shape[0] // rank
    product = b.reshape(groups, out // groups, rank) @ a.reshape(groups, rank, -1)
    return product.reshape(out, *a.shape[1:])
