"""How the two factors of a low-rank change start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.engine.checkpoint import LOADING
from inlay.engine.piece import trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.lora.data_start import data_start, is_from_data, is_subtracted
from inlay.pieces.lora.quantised_start import is_quantised, largest_part, what_was_lost

INITS = ("kaiming", "gaussian", "orthogonal", "olora", "pissa", "loftq", "random")


def factor_shapes(r: int, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B at a site, as in `kernels.low_rank`. Raises ConfigError when the sizes do not divide."""
    weight = site.weight
    if site.kind == "embedding":
        return (r, weight.shape[0]), (weight.shape[1], r)
    if site.kind == "conv":
        groups = int(getattr(site.module, "groups", 1))
        if r % groups:
            raise ConfigError(f"r={r} does not divide by the {groups} groups of the convolution {site.name}")
        return (r, *weight.shape[1:]), (weight.shape[0], r // groups, *([1] * (weight.dim() - 2)))
    if site.kind == "parameter" and weight.dim() == 3:
        experts = weight.shape[0]
        return (r * experts, site.in_features), (site.out_features, r * experts)
    if site.kind == "parameter" and weight.dim() != 2:
        raise UnsupportedError(f"{site.name} has shape {tuple(weight.shape)}: low rank needs 2 or 3 dimensions")
    return (r, site.in_features), (site.out_features, r)


def initial_factors(r: int, init: Any, site: Site, scale: float) -> tuple[Tensor, Tensor, bool]:
    """A and B, and whether their product must be kept and subtracted because it is not zero.

    "kaiming" draws A uniformly from ±1/√in and leaves B zero; for tables A is zero and B from N(0, 1). So does HF peft.
    """
    shape_a, shape_b = factor_shapes(r, site)
    dtype, device = trainable_dtype(site.weight.dtype), site.weight.device
    a = torch.empty(shape_a, dtype=dtype, device=device)
    if LOADING.get():  # a file is about to fill them
        return a, torch.empty(shape_b, dtype=dtype, device=device), is_subtracted(init)
    b = torch.zeros(shape_b, dtype=dtype, device=device)
    if is_from_data(init):
        found_a, found_b = data_start(init).factors(site, r)
        b = b if found_b is None else found_b.to(device, dtype, copy=True)
        return found_a.to(device, dtype, copy=True), b, is_subtracted(init)
    if init == "loftq":
        if is_quantised(site.weight):
            _check_rank(r, init, site, site.weight.quant_state.shape)  # type: ignore[attr-defined]
            a, b = largest_part(what_was_lost(site), r, scale)
            return a.to(dtype), b.to(dtype), False
        init = "kaiming"  # nothing was lost here
    if init == "kaiming" and site.kind != "embedding":
        bound = 1 / math.sqrt(a[0].numel())
        return a.uniform_(-bound, bound), b, False
    a.zero_()
    if init == "random":
        return a.normal_(std=0.1), b.normal_(std=0.1), False
    if init == "kaiming":
        return a, b.normal_(), False
    if init == "gaussian":
        (b if site.kind == "embedding" else a).normal_(std=1 / r)
        return a, b, False
    if site.kind != "linear":
        raise UnsupportedError(f"init={init!r} is for linears, and {site.name} is a {site.kind}: use 'kaiming' there")
    if init == "orthogonal":
        return *_orthogonal(a, b, r), False
    if not site.weight.is_floating_point():
        raise UnsupportedError(f"init={init!r} factors the weight of {site.name}, which is quantised: use 'kaiming'")
    weight = site.weight.detach().to(torch.float32)
    weight = weight.T if site.transposed else weight
    _check_rank(r, init, site, weight.shape)
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].to(dtype).contiguous(), q[:, :r].to(dtype).contiguous(), True
    a, b = largest_part(weight, r, scale)
    return a.to(dtype), b.to(dtype), True


def factored(site: Site, r: int, what: str, keep: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k) and V (k, in) of a linear's or an embedding's weight in fp32, with U S V the weight.

    Raises ConfigError where r leaves fewer than `keep` of the k directions, UnsupportedError for quantised weights.
    """
    if not site.weight.is_floating_point():
        raise UnsupportedError(f"{what} factors the weight of {site.name}, which is quantised: use LoRA there")
    weight = site.weight.detach().to(torch.promote_types(site.weight.dtype, torch.float32))
    weight = weight.T if site.transposed or site.kind == "embedding" else weight
    if r > min(weight.shape) - keep:
        most = min(weight.shape) - keep
        raise ConfigError(f"{what}(r={r}) takes r directions of {site.name}, whose weight can give {most} at most")
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u, s, v


def _check_rank(r: int, init: str, site: Site, shape: Sequence[int]) -> None:
    if r > min(shape):
        raise ConfigError(f"init={init!r} takes r={r} directions of {site.name}, whose weight has only {min(shape)}")


def _orthogonal(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A in the span of the even rows of a random orthogonal matrix, B in that of the odd ones: B A = 0."""
    if r % 2:
        raise ConfigError(f"init='orthogonal' needs an even rank, not r={r}")
    q, _ = torch.linalg.qr(torch.randn(r, r, dtype=a.dtype, device=a.device))
    even, odd = q[0::2], q[1::2]
    a.copy_((torch.randn(a.shape[1], r // 2, dtype=a.dtype, device=a.device) @ even / 10).T)
    b.copy_(torch.randn(b.shape[0], r // 2, dtype=b.dtype, device=b.device) @ odd / 10)
    return a, b


def smaller_side(site: Site) -> int:
    """The highest rank that a weight has: of a stack of matrices (experts), each of them."""
    if site.kind == "linear":
        return min(site.in_features, site.out_features)  # the shape of a quantised weight is that of its codes
    shape = site.weight.shape
    return min(shape[-2:]) if site.kind == "parameter" else min(len(site.weight), math.prod(shape[1:]))
