"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    y = W x + s · B (A x),      s = alpha / r,  or alpha / √r with rank-stabilised scaling (Kalajdzievski 2023,
                                arXiv:2312.03732)

A (r, in), B (out, r); B starts at zero, so the model starts as the base. OLoRA (Büyükakyüz 2024, arXiv:2406.01775) and
PiSSA (Meng et al. 2024, arXiv:2404.02948) start from factors of W itself; here their starting product is subtracted in
the piece, never from the base: y = W x + s · (B A − B₀ A₀) x.

Parameters: r · (in + out) for each linear.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from inlay.engine.peft_names import peft_layers, peft_overrides, peft_targets, targets_from_peft
from inlay.engine.piece import Method, Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.trained_copy import copies
from inlay.errors import ConfigError, UnsupportedError
from inlay.kernels import low_rank
from inlay.methods._low_rank_init import INITS, initial_factors

Init = Literal["kaiming", "gaussian", "orthogonal", "olora", "pissa", "random"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """y = W x + s · B (A x): a low-rank change of chosen weights."""

    kind = "lora"
    hosts = frozenset({"linear", "conv", "embedding", "parameter"})
    default_targets = "query,value"
    peft_type = "LORA"
    paper = "Hu et al. 2021, arXiv:2106.09685"

    r: int = 8
    """Rank of the change."""
    alpha: float = 16
    """Numerator of the scale s."""
    dropout: float = 0.0
    """Probability of zeroing an entry of x before A, in training."""
    rank_stabilised: bool = False
    """s = alpha / √r instead of alpha / r."""
    init: Init = "kaiming"
    """How A and B start: kaiming or gaussian A with B = 0; orthogonal (B A = 0); olora (QR of W); pissa (SVD of W)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Train biases of the base too: every one in the model, or those of the adapted modules."""
    lora_bias: bool = False
    """A bias on B."""

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"{type(self).__name__}(r={self.r!r}): the rank must be a whole number of at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{type(self).__name__}(dropout={self.dropout!r}): a probability in [0, 1) is needed")
        if self.init not in INITS:
            raise ConfigError(f"{type(self).__name__}(init={self.init!r}): choose one of {', '.join(INITS)}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"{type(self).__name__}(bias={self.bias!r}): choose one of none, all, lora_only")

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)

    def piece(self, site: Site) -> Piece:
        return LoRAPiece(self, site)

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        made = super().build(model, sites)
        if self.bias != "none":
            adapted = {site.path for site in sites}
            biases = (site for site in SiteIndex(model).parameters() if site.parameter == "bias")
            made += copies(site for site in biases if self.bias == "all" or site.path in adapted)
        return made

    def file_key(self, site: Site, name: str) -> str:
        return f"base_model.model.{site.name}" if not name else super().file_key(site, name)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        rank_pattern, alpha_pattern = peft_overrides(self, sites, "r"), peft_overrides(self, sites, "alpha")
        doubled = 2 if self.init in ("olora", "pissa") else 1
        # Factors of W are exported with their starting product as a second half: twice the rank, the same scale.
        alpha = math.sqrt(doubled) if self.rank_stabilised else doubled
        return {
            **peft_targets(sites, index),
            "r": self.r * doubled,
            "lora_alpha": self.alpha * alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilised,
            "init_lora_weights": {"gaussian": "gaussian", "orthogonal": "orthogonal"}.get(self.init, True),
            "bias": self.bias,
            "lora_bias": self.lora_bias,
            "fan_in_fan_out": any(site.kind == "linear" and site.transposed for site in sites),
            "rank_pattern": {name: rank * doubled for name, rank in rank_pattern.items()},
            "alpha_pattern": {name: value * alpha for name, value in alpha_pattern.items()},
        }

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this dataclass that a peft LoraConfig gives. Raises UnsupportedError for what is not here."""
        for field in ("use_qalora", "alora_invocation_tokens", "layer_replication", "use_bdlora", "arrow_config",
                      "kasa_config", "velora_config", "monteclora_config", "megatron_config"):
            if config.get(field):
                raise UnsupportedError(f"this LoRA adapter uses {field}, which Inlay does not have")
        patterns: dict[str, dict[str, Any]] = {}
        for ours, theirs in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
            for name, value in (config.get(theirs) or {}).items():
                patterns.setdefault(f"re:(.*\\.)?({name})", {})[ours] = value
        init = config.get("init_lora_weights", True)
        return {
            **targets_from_peft(config),
            **peft_layers(config),
            "r": config.get("r", 8),
            "alpha": config.get("lora_alpha", 8),
            "dropout": config.get("lora_dropout", 0.0),
            "rank_stabilised": config.get("use_rslora", False),
            "init": init if init in ("gaussian", "orthogonal") else "kaiming",
            "bias": config.get("bias", "none"),
            "lora_bias": config.get("lora_bias", False),
            "overrides": patterns,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        from inlay.engine.registry import method_class

        if config.get("use_dora"):
            return [method_class("dora")(**cls.fields_from_peft(config))]
        return [cls(**cls.fields_from_peft(config))]


class LoRAPiece(Piece):
    """A and B at one site. On a bare parameter it reads as W + s·BA; elsewhere it runs beside the host's call."""

    def __init__(self, method: LoRA, site: Site) -> None:
        super().__init__()
        self.scale = method.scale
        self.dropout = method.dropout
        self.kind = site.kind
        self.shape = site.weight.shape
        self.input_last = not (site.kind == "parameter" and site.transposed)
        if site.kind == "parameter" and method.dropout:
            raise UnsupportedError(
                f"LoRA(dropout={method.dropout}) cannot sit at {site.name}: a bare parameter has no input to drop; "
                "use dropout=0, or an override for this place"
            )
        a, b, keep = initial_factors(method.r, method.init, site, method.scale)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.lora_bias = nn.Parameter(b.new_zeros(b.shape[0])) if method.lora_bias else None
        self.register_buffer("start_A", a.clone() if keep else None)
        self.register_buffer("start_B", b.clone() if keep else None)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = inner(x, *args, **kwargs)
        if self.dropout and self.training and self.kind != "embedding":
            x = F.dropout(x, self.dropout)
        change = self.change(inner.module, x, self.lora_A, self.lora_B, self.lora_bias)
        if self.start_A is not None:
            change = change - self.change(inner.module, x, self.start_A, self.start_B)
        return y + (self.scale * change).to(y.dtype)

    def change(self, host: nn.Module, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """B (A x), in the form that the host computes."""
        if self.kind == "embedding":
            return low_rank.embedding(x, a, b, cast("nn.Embedding", host))
        if self.kind == "conv":
            return low_rank.convolution(x, a, b, host, bias)
        return low_rank.linear(x, a, b, bias)

    def delta(self) -> Tensor:
        """s · (B A − B₀ A₀), in the shape and orientation of the weight."""
        change = low_rank.delta(self.lora_A, self.lora_B, self.shape, input_last=self.input_last)
        if self.start_A is not None:
            change = change - low_rank.delta(self.start_A, self.start_B, self.shape)
        return self.scale * (change.T if self.kind == "embedding" else change)

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta()

    def bias(self, bias: Tensor | None) -> Tensor | None:
        if self.lora_bias is None:
            return bias
        return self.scale * self.lora_bias if bias is None else bias + self.scale * self.lora_bias

    def file_tensors(self) -> dict[str, Tensor]:
        names = ("lora_embedding_A", "lora_embedding_B") if self.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        a, b = self.lora_A, self.lora_B
        if self.start_A is not None:
            # [A; A₀] and [B, −B₀]: the same change as a plain LoRA of twice the rank, which any reader can use.
            a, b = torch.cat([a, self.start_A]), torch.cat([b, -self.start_B], dim=1)
        tensors = {names[0]: a, names[1]: b}
        return tensors if self.lora_bias is None else tensors | {"lora_B.bias": self.lora_bias}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        a, b, *bias = tensors.values()
        with torch.no_grad():
            r = self.lora_A.shape[0]
            self.lora_A.copy_(a[:r])
            self.lora_B.copy_(b[:, : self.lora_B.shape[1]])
            if self.start_A is not None:
                self.start_A.copy_(a[r:])
                self.start_B.copy_(-b[:, r:])
            if self.lora_bias is not None:
                self.lora_bias.copy_(bias[0])
