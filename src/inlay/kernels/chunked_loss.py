"""The cross-entropy of a linear's outputs, a chunk of tokens at a time: the logits of all tokens never exist at once.

    z_t = W x_t + b,    loss = Σ_t (log Σ_v exp z_tv  −  z_t,y(t))      over the tokens t whose label y(t) counts

    g_t = softmax(z_t) − onehot(y(t)),    dx_t = Wᵀ g_t,    dW = Σ_t g_t x_tᵀ,    db = Σ_t g_t

The gradients need nothing but the chunk's own logits, so they are made with the loss, in the forward pass, and scaled
by the incoming gradient in the backward pass (as in the published linear-cross-entropy kernels of Liger-Kernel, Hsu et
al. 2024, arXiv:2410.10989). Logits are computed in the dtype of the linear and the softmax in fp32, as transformers
does; equal to `reference`, up to the order of sums.

FLOPs for T counted tokens, width d and V classes: 2 T d V for the loss and 2 T d V for dx, as without chunks, and as
much again for dW where the head trains; ignored tokens cost nothing. Bytes kept for the backward pass: T d, and V d for
dW; beside them at most `CHUNK` for a chunk's logits and as much for g. Without chunks: T V in the linear's dtype, and
T V in fp32.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.errors import UnsupportedError
from inlay.kernels.choice import compute_dtype, fusible, without_autocast

CHUNK = 2**26
"""Bytes of one chunk's logits in fp32."""
IGNORE = -100
"""The label that does not count."""


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore: int = IGNORE) -> Tensor:
    """The same loss by the plain formula, for x (…, d), W (V, d), b (V) or None and labels (…): a number, in nats."""
    logits = F.linear(x, weight, bias).flatten(0, -2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=ignore, reduction="sum")


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore: int = IGNORE, rows: int | None = None
) -> Tensor:
    """Cross-entropy of x Wᵀ + b summed over the labels that are not `ignore`, `rows` tokens at a time.

    x is (…, d), W (V, d), b (V) or None, labels (…). Here plain formula or function is chosen. Raises
    UnsupportedError, in the backward pass, when gradients of gradients are asked for.
    """
    if not fusible(x):
        return reference(x, weight, bias, labels, ignore)
    rows = rows or max(1, CHUNK // (4 * weight.shape[0]))
    flat, labels = x.flatten(0, -2), labels.flatten()
    counted = (labels != ignore).nonzero().squeeze(1)
    if len(counted) < len(labels):
        flat, labels = flat[counted], labels[counted]
    arguments = (flat, weight, bias, labels, rows, compute_dtype(x))
    return cast(Tensor, ChunkedLoss.apply(*arguments))  # type: ignore[no-untyped-call]


class ChunkedLoss(torch.autograd.Function):
    """Σ_t cross-entropy(W x_t + b, y_t) for x (T, d), W (V, d), b (V) or None, y (T), every one of which counts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: int, dtype: torch.dtype
    ) -> Tensor:
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = torch.empty_like(x) if need_x else None
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        dweight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=exact) if need_bias and bias is not None else None
        loss = torch.zeros((), dtype=exact, device=x.device)
        with without_autocast(x):
            values, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, len(x), rows):
                part, truth = x[start : start + rows].to(dtype), labels[start : start + rows, None]
                logits = F.linear(part, values, offset).to(exact)
                logits -= logits.logsumexp(1, keepdim=True)
                loss -= logits.gather(1, truth).sum()
                if not (need_x or need_weight or need_bias):
                    continue
                g = logits.exp_().scatter_add_(1, truth, logits.new_full(truth.shape, -1.0)).to(dtype)
                if dx is not None:
                    dx[start : start + rows] = g @ values
                if dweight is not None:
                    dweight += g.t() @ part
                if dbias is not None:
                    dbias += g.sum(0)
        # Sums over chunks were kept in fp32; the gradient is rounded once, as one product would be.
        dweight, dbias = (None if sums is None else sums.to(weight.dtype) for sums in (dweight, dbias))
        ctx.save_for_backward(dx, dweight, dbias)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedError("the chunked loss has no second derivative; use the plain loss (chunked_loss=false)")
        found = [None if gradient is None else gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors]
        return (*found, None, None, None)
