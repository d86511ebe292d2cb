"""A linear whose weight changes at n fixed positions, y = x (W + Δ)ᵀ + b with Δ[row_k, column_k] = v_k.

    dv_k = dy[:, row_k] · x[:, column_k],     dx = dy (W + Δ)

The gradient is computed at the positions only (torch's sampled product), so that dyᵀ x is never there as a matrix.
While T n < out in (T rows of x), Δ is multiplied as a sparse matrix, apart from W; above that a copy of W with v added
is multiplied once, in the forward and again in the backward, and not kept. In half precision, where the sum would lose
a small v to rounding, Δ is always multiplied apart, in fp32.

FLOPs beyond the frozen linear's: 2 T n for dv, and 4 T n where Δ is multiplied apart. Bytes kept: x, v, positions.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels import dense
from inlay.kernels.choice import compute_dtype, fusible, without_autocast
from inlay.kernels.lora import rows, suits

if TYPE_CHECKING:
    from inlay.engine.host import Inner

MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


class Positions(NamedTuple):
    """Distinct places in a matrix (out, in), row by row and in each row from left to right."""

    rows: Tensor
    """(n), int32."""
    columns: Tensor
    """(n), int32."""
    shape: tuple[int, int]

    def flat(self) -> Tensor:
        """(n), indices into the flattened matrix."""
        return self.rows.long() * self.shape[1] + self.columns

    def sparse(self, values: Tensor) -> Tensor:
        """The matrix with these values there and 0 elsewhere, in compressed rows."""
        quieted()
        numbers = torch.arange(self.shape[0] + 1, dtype=self.rows.dtype, device=self.rows.device)
        starts = torch.searchsorted(self.rows, numbers, out_int32=True)
        return torch.sparse_csr_tensor(starts, self.columns, values.detach(), self.shape, check_invariants=False)


@functools.cache
def quieted() -> None:
    """Have torch say once, unheard, that its compressed sparse tensors are a beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        empty = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int32), empty[:0], torch.zeros(0), (1, 1))


def places(flat: Tensor, shape: tuple[int, int]) -> Positions:
    """The places of indices into the flattened matrix, sorted and distinct."""
    return Positions((flat // shape[1]).int(), (flat % shape[1]).int(), shape)


def drawn(count: int, total: int, seed: int | None) -> Tensor:
    """So many distinct numbers below `total`, in random order, as HF peft draws them; None: torch's own generator."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator, device="cpu")[:count]


def scattered(values: Tensor, flat: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix with these values at these places and 0 elsewhere; values at one place add up."""
    return values.new_zeros(shape[0] * shape[1]).index_add(0, flat, values).view(shape)


def changed(inner: Inner, x: Tensor, values: Tensor, where: Positions) -> Tensor:
    """inner(x) + x Δᵀ for x (…, in)."""
    base, dtype = inner.linear(), compute_dtype(x)
    if not fusible(x, values) or not has_sparse_products(x):
        return dense.changed(inner, x, lambda v: scattered(v, where.flat(), where.shape), [values])
    values = values.to(torch.promote_types(values.dtype, torch.float32))  # there are no sparse products in bf16
    alone = base is None or base.decode is not None or base.weight.requires_grad or not suits(base, x, dtype)
    few = x.numel() * len(values) < x.shape[-1] * where.shape[0] * where.shape[1]
    if alone or few or base is None or not base.weight.dtype == values.dtype == dtype:
        y: Tensor = inner(x)
        return y + cast(Tensor, SparseProduct.apply(x, values, where)).to(y.dtype)  # type: ignore[no-untyped-call]
    return cast(Tensor, ChangedLinear.apply(x, base.weight, base.bias, values, where))  # type: ignore[no-untyped-call]


def has_sparse_products(x: Tensor) -> bool:
    """Whether torch multiplies sparse matrices where x is, and fast: on a CPU, through MKL."""
    return x.device.type == "cuda" or (x.device.type == "cpu" and MKL)


class SparseProduct(torch.autograd.Function):
    """x Δᵀ for x (…, in), in the dtype of v, fp32 or fp64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, where: Positions) -> Tensor:
        ctx.where = where
        ctx.save_for_backward(x, values)
        with without_autocast(x):
            y = (where.sparse(values) @ rows(x).to(values.dtype).t()).t()
        return y.reshape(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        with without_autocast(dy):
            dx = None
            if ctx.needs_input_grad[0]:
                part = (ctx.where.sparse(values).t() @ rows(dy).to(values.dtype).t()).t()
                dx = part.reshape(x.shape).to(x.dtype)
            dvalues = at_positions(dy, x, values, ctx.where) if ctx.needs_input_grad[1] else None
        return dx, dvalues, None


class ChangedLinear(torch.autograd.Function):
    """x (W + Δ)ᵀ + b for x (…, in), W (out, in) frozen, b (out) or None, all in one dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, where: Positions) -> Tensor:
        ctx.where, ctx.dtype = where, values.dtype
        ctx.save_for_backward(x, weight, values)
        bias = None if bias is None else bias.to(values.dtype)
        return F.linear(x.to(values.dtype), added(weight, values, where), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values = ctx.saved_tensors
        need_x, _, need_bias, need_values, _ = ctx.needs_input_grad
        with without_autocast(dy):
            dx = (dy @ added(weight, values, ctx.where)).to(x.dtype) if need_x else None
            dvalues = at_positions(dy, x, values, ctx.where) if need_values else None
        return dx, None, rows(dy).sum(0) if need_bias else None, dvalues, None


def added(weight: Tensor, values: Tensor, where: Positions) -> Tensor:
    """A copy of W with v added at the positions."""
    total = weight.clone(memory_format=torch.contiguous_format)
    total.view(-1).scatter_add_(0, where.flat(), values)
    return total


def at_positions(dy: Tensor, x: Tensor, values: Tensor, where: Positions) -> Tensor:
    """dyᵀ x at the positions, (n)."""
    empty, left, right = where.sparse(torch.zeros_like(values)), rows(dy), rows(x)
    found: Tensor = torch.sparse.sampled_addmm(empty, left.to(values.dtype).t(), right.to(values.dtype)).values()
    return found
