"""Random bases, and random directions that are scaled twice: RandLoRA's A_j = Λ_j A Γ_j for all j, one under another.

    out[i, j] = λ[i, j] · a[i] ⊙ γ[j]
    dλ[i, j] = Σ dout[i, j] ⊙ a[i] ⊙ γ[j],     dγ[j] = Σ_i λ[i, j] · dout[i, j] ⊙ a[i]

for a (r, m) frozen, λ (r, n), γ (n, m) and out (r n, m), about m rows where n is as large as makes the rank full.

Bytes kept: λ and γ; autograd would keep two more tensors of the size of out. Bytes moved: out twice, dout once and
a tensor of its size twice.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inlay.kernels.choice import fusible


def scaled(a: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """(r n, m) from a (r, m), λ (r, n) and γ (n, m)."""
    if not fusible(a, inner, outer):
        return (inner[:, :, None] * a[:, None] * outer).flatten(0, 1)
    return cast(Tensor, ScaledBases.apply(a, inner, outer))  # type: ignore[no-untyped-call]


def drawn(r: int, small: int, large: int, seed: int, one_in: float | None = None) -> tuple[Tensor, Tensor]:
    """A (r, 1, small) and B (large, n, r), n = ⌈small / r⌉, of standard deviation 1, by the draws that HF peft makes.

    One entry in `one_in` is ±1 and the others are 0 before they are scaled, or all are uniform. These are drawn in
    bfloat16, as peft draws them on any machine that has it: another type gives other numbers.
    """
    generator, n = torch.Generator().manual_seed(seed), math.ceil(small / r)
    if one_in is not None:
        shapes = [(r, 1, small), (large, n, r)]
        uniform = [torch.rand(shape, generator=generator, dtype=torch.float32) for shape in shapes]
        a, b = ((u > 1 - 0.5 / one_in).float() - (u < 0.5 / one_in).float() for u in uniform)
    else:
        shapes = [(r, 1, small), *[(large, 1, r)] * n]
        empty = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        a, *columns = [nn.init.kaiming_uniform_(one, a=math.sqrt(5), generator=generator) for one in empty]
        b = torch.cat(columns, dim=1)
    return a / a.std(), b / b.std()


class ScaledBases(torch.autograd.Function):
    """λ[i, j] · a[i] ⊙ γ[j], row i n + j."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        ctx.save_for_backward(a, inner, outer)
        return (a[:, None] * outer).mul_(inner[:, :, None]).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a, inner, outer = ctx.saved_tensors
        (r, n), m = inner.shape, outer.shape[1]
        by_outer = (grad.view(r, n, m) * a[:, None]).transpose(0, 1)  # (n, r, m)
        dinner = torch.bmm(by_outer, outer[:, :, None])[..., 0].t() if ctx.needs_input_grad[1] else None
        douter = torch.bmm(inner.t()[:, None], by_outer)[:, 0] if ctx.needs_input_grad[2] else None
        return None, dinner, douter
