"""MonteCLoRA's piece: LoRA whose A is drawn around its mean in training; and the loss that holds the spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.controller import Controller
from inlay.engine.sites import Site
from inlay.kernels import lora as kernel
from inlay.kernels import low_rank, monte_carlo
from inlay.pieces.lora.piece import LoRAPiece

SAMPLER = "lora_monteclora_sampler."


class MonteCarloLoRAPiece(LoRAPiece):
    """A, B, log σ (r) and log α (N); v and w of the last draw are in HF peft's files, and so here: all by its names."""

    gaussian_var_prior: Tensor
    expert_weights: Tensor

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__(method, site)
        self.samples, self.spread = method.num_samples, method.sample_scaler
        self.loss_weight, self.prior = method.kl_loss_weight, method.dirichlet_prior
        self.entropy, self.compat = method.use_entropy, method.compat
        place: dict[str, Any] = {"device": self.lora_B.device, "dtype": self.lora_B.dtype}
        self.std_prior = nn.Parameter(torch.rand(method.r, **place))
        self.expert_weights_prior = nn.Parameter(torch.rand(self.samples, **place))
        self.register_buffer("gaussian_var_prior", torch.eye(method.r, **place))
        self.register_buffer("expert_weights", torch.full((self.samples,), 1 / self.samples, **place))
        self._draw: monte_carlo.Draw | None = None

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().forward(inner, x, *args, **kwargs)
        a = self.drawn()
        if self.plain and not args and not kwargs:
            return kernel.adapted(inner, x, a, self.lora_B, self.scale, self.dropout)
        y = inner(x, *args, **kwargs)
        x = x.to(a.dtype) if self.exact else x
        x = F.dropout(x, self.dropout) if self.dropout else x
        return y + (self.scale * low_rank.linear(x, a, self.lora_B, self.lora_bias)).to(y.dtype)

    def drawn(self) -> Tensor:
        """A with fresh noise, which `loss` remembers."""
        self._draw = monte_carlo.drawn(self.std_prior, self.expert_weights_prior)
        v, w = self.variances_and_shares()
        with torch.no_grad():
            self.gaussian_var_prior.copy_(torch.diag(v))
            self.expert_weights.copy_(w)
        return monte_carlo.perturbed(self.lora_A, v, w, torch.randn_like(self.lora_A), self.spread)

    def variances_and_shares(self) -> tuple[Tensor, Tensor]:
        """v and w of the last draw, as functions of the parameters; what they are held to, before the first."""
        if self._draw is None:
            return self.gaussian_var_prior.float().diagonal(), self.expert_weights.float()
        chi, epsilon = self._draw
        return monte_carlo.variances(self.std_prior, chi), monte_carlo.shares(self.expert_weights_prior, epsilon)

    def loss(self) -> Tensor:
        """β · (the three divergences), and Σ w² where that is asked for; in fp32, of the last draw."""
        v, w = self.variances_and_shares()
        divergence = monte_carlo.dirichlet_divergence(self.expert_weights_prior, self.prior, self.compat)
        divergence = divergence + monte_carlo.wishart_divergence(self.std_prior)
        loss: Tensor = self.loss_weight * (divergence + monte_carlo.normal_divergence(v, self.samples))
        return loss + w.square().sum() if self.entropy else loss

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.lora_bias is not None else (self.lora_A, self.lora_B, self.scale)

    def file_tensors(self) -> dict[str, Tensor]:
        names = ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
        return super().file_tensors() | {SAMPLER + name: getattr(self, name) for name in names}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        rest = dict(tensors)
        with torch.no_grad():
            for name in [name for name in rest if name.startswith(SAMPLER)]:
                getattr(self, name.removeprefix(SAMPLER)).copy_(rest.pop(name))
        super().load_file_tensors(rest)

    def _tensors(self) -> dict[str, Tensor]:
        """Without what only training reads."""
        return {name: tensor for name, tensor in super()._tensors().items() if name.startswith("lora_")}


class VariationalLoss(Controller):
    """The mean of the places' losses."""

    def __init__(self, pieces: Sequence[MonteCarloLoRAPiece]) -> None:
        self.pieces = [piece for piece in pieces if piece.loss_weight or piece.entropy]
        self.places = len(pieces)

    def extra_loss(self) -> Tensor | None:
        if not self.pieces:
            return None
        first = self.pieces[0].lora_B.device  # of a model on several devices, one
        return torch.stack([piece.loss().to(first) for piece in self.pieces]).sum() / self.places
