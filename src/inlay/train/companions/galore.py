"""GaLore: AdamW whose moments live in a low-rank projection of the gradient (Zhao et al. 2024, arXiv:2403.03507).

    P = the first r right singular vectors of G, anew every `update_every` steps        G (m, n), m ≥ n
    R = G P,     N = AdamW's direction from the moments of R,     W ← W − lr · scale · N Pᵀ

With m < n, P are left singular vectors and R = Pᵀ G. For full fine-tuning: nothing is low-rank but the optimiser's
state, r (2 max(m, n) + min(m, n)) numbers for a matrix in place of 2 m n. What is no matrix, an embedding, or not
larger than r both ways gets plain AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inlay.engine.adapters import find_adapters
from inlay.errors import ConfigError


def galore(
    model: nn.Module,
    *,
    lr: float,
    rank: int = 128,
    update_every: int = 200,
    scale: float = 0.25,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> GaLoreAdamW:
    """An optimiser for all that is trainable in `model`. Weight decay is for matrices, not for biases and norms.

    Raises ConfigError for a field that cannot be used, and where no trained matrix is larger than `rank` both ways.
    """
    for name, value in (("rank", rank), ("update_every", update_every)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"GaLore({name}={value!r}): a whole number of at least 1 is needed")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < math.inf:
        raise ConfigError(f"GaLore(scale={scale!r}): a number above 0 is needed, such as 0.25")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tables = _embeddings(model)
    projected = [p for p in trained if p.dim() == 2 and min(p.shape) > rank and id(p) not in tables]
    if not projected:
        raise ConfigError(
            f"GaLore(rank={rank}) is for full fine-tuning, and no matrix trained here is larger than that both ways: "
            "train with method full or freezing, or lower the rank"
        )
    chosen = {id(parameter) for parameter in projected}
    rest = [parameter for parameter in trained if id(parameter) not in chosen]
    groups = [
        {"params": projected, "weight_decay": weight_decay, "rank": rank},
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": weight_decay, "rank": None},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "rank": None},
    ]
    defaults = {"lr": lr, "betas": betas, "eps": eps, "update_every": update_every, "scale": scale}
    return GaLoreAdamW([group for group in groups if group["params"]], defaults)


def _embeddings(model: nn.Module) -> set[int]:
    """The tables that ids are looked up in, and the trained copies of them."""
    found = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters(False)}
    adapters = find_adapters(model)
    if adapters is not None:
        placed = (one for adapter in adapters.loaded.values() for one in adapter.pieces())
        found |= {id(p) for s, piece in placed if isinstance(s.module, nn.Embedding) for p in piece.parameters()}
    return found


class GaLoreAdamW(Optimizer):
    """AdamW, with projected moments in the groups that have a rank."""

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        step = state["step"] = state.get("step", 0) + 1
        rank = group["rank"]
        if rank is not None:
            if (step - 1) % group["update_every"] == 0:
                state["projection"] = subspace(gradient, rank)
            gradient = project(gradient, state["projection"])
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        direction = state["exp_avg"] / (1 - beta1**step) / spread
        if rank is not None:
            direction = group["scale"] * project_back(direction, state["projection"], parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])

    def state_bytes(self) -> tuple[int, int]:
        """(bytes that the state takes once each parameter has moved, what AdamW's moments would take)."""
        ours = theirs = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                size, theirs = parameter.element_size(), theirs + 2 * parameter.nbytes
                if group["rank"] is None:
                    ours += 2 * parameter.nbytes
                else:
                    small, large = sorted(parameter.shape)
                    ours += size * group["rank"] * (2 * large + small)
        return ours, theirs


def subspace(gradient: Tensor, rank: int) -> Tensor:
    """The singular vectors of the shorter side, (min(m, n), rank), for G (m, n)."""
    u, _, v = torch.linalg.svd(gradient.float(), full_matrices=False)
    vectors: Tensor = v[:rank].t() if gradient.shape[0] >= gradient.shape[1] else u[:, :rank]
    return vectors.to(gradient.dtype).contiguous()


def project(gradient: Tensor, vectors: Tensor) -> Tensor:
    """R: (m, rank) for m ≥ n, otherwise (rank, n)."""
    small: Tensor = gradient @ vectors if gradient.shape[0] >= gradient.shape[1] else vectors.t() @ gradient
    return small


def project_back(small: Tensor, vectors: Tensor, shape: torch.Size) -> Tensor:
    """What R stands for, (m, n)."""
    return small @ vectors.t() if shape[0] >= shape[1] else vectors @ small
