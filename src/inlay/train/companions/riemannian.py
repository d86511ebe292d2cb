"""Riemannian preconditioned LoRA: gradients scaled by the other factor (Zhang, Pilanci 2024, arXiv:2402.02347).

    ∂A ← (Bᵀ B + δ I)⁻¹ ∂A,     ∂B ← ∂B (A Aᵀ + δ I)⁻¹

A step then moves B A by the same amount however its size is shared out between the two, so that one learning rate fits
both. What follows (moments, clipping by the optimiser, weight decay) sees these gradients. With A frozen only B's is
scaled. It keeps no state: a resumed run needs nothing for it. Costs 2 r² (in + out) FLOPs a place and step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from inlay.engine.adapters import adapters_of
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.lora.piece import LoRAPiece


def riemannian(optimizer: Optimizer, model: nn.Module, damping: float = 1e-6) -> RemovableHandle:
    """From now on each `optimizer.step()` scales the gradients of every LoRA of the active adapters first.

    `damping` is δ. Returns a handle whose `remove()` ends it. Raises ConfigError where there is no LoRA to train, and
    UnsupportedError for one whose factors are blocks (grouped convolutions, stacked experts).
    """
    if not isinstance(damping, int | float) or isinstance(damping, bool) or not 0 < damping < math.inf:
        raise ConfigError(f"Riemannian preconditioning (damping={damping!r}): a number above 0 is needed, such as 1e-6")
    pairs = list(_pairs(model))
    if not pairs:
        raise ConfigError("Riemannian preconditioning scales the gradients of LoRA's A and B, and no LoRA trains here")

    def scale(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        precondition(pairs, damping)

    return optimizer.register_step_pre_hook(scale)


@torch.no_grad()
def precondition(pairs: list[tuple[Tensor, Tensor]], damping: float) -> None:
    """Scale the gradients of these A (r, …) and B (out, r, …) in place; those without a gradient are passed over."""
    jobs: dict[tuple[int, torch.device], list[tuple[Tensor, Tensor]]] = {}  # (gradient (r, …), what scales it (r, r))
    for a, b in pairs:
        key = a.shape[0], a.device
        if a.grad is not None:
            jobs.setdefault(key, []).append((a.grad.flatten(1), b.flatten(1).t() @ b.flatten(1)))
        if b.grad is not None:
            jobs.setdefault(key, []).append((b.grad.flatten(1).t(), a.flatten(1) @ a.flatten(1).t()))
    for (r, device), found in jobs.items():
        grams = torch.stack([gram for _, gram in found]).double()  # of a few numbers; near zero at the start for B
        inverses = torch.linalg.inv(grams + damping * torch.eye(r, dtype=grams.dtype, device=device))
        for (gradient, _), inverse in zip(found, inverses, strict=True):
            gradient.copy_(inverse.to(gradient.dtype) @ gradient)


def _pairs(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    for site, piece in adapters_of(model).active_pieces():
        if isinstance(piece, LoRAPiece) and piece.lora_B.requires_grad:
            if piece.groups > 1 or (len(piece.shape) > 2 and piece.kind == "parameter"):
                raise UnsupportedError(
                    "Riemannian preconditioning takes A and B as one matrix each, and those of "
                    f"{site.name} are blocks: leave that place out"
                )
            yield piece.lora_A, piece.lora_B
