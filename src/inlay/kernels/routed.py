"""x A, then a B that is a mixture of several, in shares that a router gives from x A itself.

    h = A x,     p = mean over all rows of softmax(R h),     y = y₀ + s · (Σ_e p_e B_e)ᵀ h

The B_e are summed before they are multiplied, so that a row costs one product with B and not one for each expert.

FLOPs beyond y₀: 2 T r (in + out + n) and n r out for the mixture, three times that with the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels.choice import compute_dtype
from inlay.kernels.lora import rows


def shares(h: Tensor, router: Tensor) -> Tensor:
    """p (n): how much each expert counts for this batch; in fp32, since it is a mean over many rows."""
    logits = F.linear(rows(h), router.to(h.dtype))
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(0)


def mixed(p: Tensor, experts: Tensor) -> Tensor:
    """Σ_e p_e B_e (r, out) for B (n r, out), the experts one below the other."""
    n, out = p.shape[0], experts.shape[1]
    return (p.to(experts.dtype)[None] @ experts.view(n, -1)).view(-1, out)


def routed(inner: Any, x: Tensor, a: Tensor, experts: Tensor, router: Tensor, scale: float) -> Tensor:
    """inner(x) + s · (Σ_e p_e B_e)ᵀ A x for A (r, in), B (n r, out) and R (n, r)."""
    y: Tensor = inner(x)
    if not x.numel():  # no row, no mean: an expert of a mixture that no token was sent to
        return y
    dtype = compute_dtype(x)
    h = F.linear(x, a.to(dtype))
    b = mixed(shares(h, router), experts).to(h.dtype)
    if y.dtype == h.dtype:
        return torch.addmm(rows(y), rows(h), b, alpha=scale).view(y.shape)
    return y + (scale * (h @ b)).to(y.dtype)
