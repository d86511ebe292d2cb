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
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.host import base_class
from inlay.engine.peft_names import file_paths, overrides_from_peft, peft_pattern, peft_targets, targets_from_peft
from inlay.engine.piece import Method, Piece, take
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.trained_copy import copies
from inlay.errors import CheckpointError, ConfigError, UnsupportedError
from inlay.kernels import lora as kernel
from inlay.kernels import low_rank
from inlay.methods._banked_lora import BankedLoRA
from inlay.methods._low_rank_init import INITS, initial_factors

if TYPE_CHECKING:
    from inlay.engine.bank import Bank

Init = Literal["kaiming", "gaussian", "orthogonal", "olora", "pissa", "random"]
NOT_HERE = ("use_qalora", "alora_invocation_tokens", "layer_replication", "use_bdlora", "arrow_config", "kasa_config",
            "velora_config", "monteclora_config", "megatron_config")  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Inits of peft's that change the base: what such a file holds fits only the changed base, which it does not hold."""


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
    freeze_a: bool = False
    """Train B only (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303): then x is not kept for the backward."""
    precision: Literal["model", "exact"] = "model"
    """Compute the change in the dtype of the activations, or in that of A and B (fp32), as HF peft does."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ConfigError(f"{name}(r={self.r!r}): the rank must be a whole number of at least 1")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ConfigError(f"{name}(alpha={self.alpha!r}): a number above 0 is needed, such as 16")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ConfigError(f"{name}(dropout={self.dropout!r}): a probability in [0, 1) is needed")
        if self.init not in INITS:
            raise ConfigError(f"{name}(init={self.init!r}): choose one of {', '.join(INITS)}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"{name}(bias={self.bias!r}): choose one of none, all, lora_only")
        if self.precision not in ("model", "exact"):
            raise ConfigError(f"{name}(precision={self.precision!r}): choose one of model, exact")

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

    # -- files -------------------------------------------------------------------------------------------------------

    def export(self, pieces: Sequence[tuple[Site, Piece]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {key: tensor for _, named in self._keyed(pieces) for key, (_, tensor) in named.items()}, {}

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        for piece, named in self._keyed(pieces):
            piece.load_file_tensors({name: take(tensors, key, own.shape) for key, (name, own) in named.items()})

    def _keyed(self, pieces: Sequence[tuple[Site, Piece]]) -> Iterator[tuple[Piece, dict[str, tuple[str, Tensor]]]]:
        """Each piece with its tensors by their keys in the file."""
        for path, (site, piece) in zip(file_paths(pieces), pieces, strict=True):
            named = piece.file_tensors().items()
            yield piece, {f"base_model.model.{path}.{name or site.parameter}": (name, own) for name, own in named}

    def peft_rank_and_alpha(self) -> tuple[int, float]:
        """r and alpha as the file has them: factors of W take twice the rank there, at the same scale."""
        if self.init not in ("olora", "pissa"):
            return self.r, self.alpha
        return 2 * self.r, self.alpha * (math.sqrt(2) if self.rank_stabilised else 2)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        sites = [site for site in sites if site.parameter != "bias"]
        here = {site: cast("LoRA", self.at(site)) for site in sites}
        if any(one.rank_stabilised != self.rank_stabilised for one in here.values()):
            raise UnsupportedError("HF peft has one use_rslora for all places")
        if any(site.kind == "conv" and not peft_can_convolve(site.module) for site in sites):
            raise UnsupportedError("HF peft ignores the dilation and the padding mode of convolutions")
        r, alpha = self.peft_rank_and_alpha()
        stored = {site: one.peft_rank_and_alpha() for site, one in here.items()}
        return {
            **peft_targets(sites, index),
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilised,
            "init_lora_weights": self.init if self.init in ("gaussian", "orthogonal") else True,
            "bias": self.bias,
            "lora_bias": self.lora_bias,
            "fan_in_fan_out": any(site.kind == "linear" and site.transposed for site in sites),
            "rank_pattern": peft_pattern({site: values[0] for site, values in stored.items()}, r),
            "alpha_pattern": peft_pattern({site: values[1] for site, values in stored.items()}, alpha),
        }

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this dataclass that a peft LoraConfig gives. Raises UnsupportedError for what is not here."""
        for field in NOT_HERE:
            if config.get(field):
                raise UnsupportedError(f"this LoRA adapter uses {field}, which Inlay does not have")
        init = config.get("init_lora_weights", True)
        if str(init).lower().startswith(CHANGES_BASE):
            raise UnsupportedError(
                f"this LoRA adapter was saved by HF peft with init_lora_weights={init!r}, which also changed the base; "
                "save it there with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
        dropout = config.get("lora_dropout", 0.0)
        overrides = overrides_from_peft(config, {"r": "rank_pattern", "alpha": "alpha_pattern"})
        if dropout:  # which peft leaves out, without a word, inside nn.MultiheadAttention
            overrides[r"re:(?:.*\.)?(?:in_proj_weight|out_proj\.weight)"] = {"dropout": 0.0}
        return {
            **targets_from_peft(config),
            "r": config.get("r", 8),
            "alpha": config.get("lora_alpha", 8),
            "dropout": dropout,
            "rank_stabilised": config.get("use_rslora", False),
            "init": init if init in ("gaussian", "orthogonal") else "kaiming",
            "bias": config.get("bias", "none"),
            "lora_bias": config.get("lora_bias", False),
            "overrides": overrides,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        from inlay.methods.dora import DoRA
        from inlay.methods.trainable_tokens import TrainableTokens

        method = (DoRA if config.get("use_dora") else cls)(**cls.fields_from_peft(config))
        return [method, *(TrainableTokens.from_lora(config) if config.get("trainable_token_indices") else [])]


def peft_can_convolve(module: nn.Module) -> bool:
    """Whether peft's A, which copies only kernel, stride and padding, convolves as this module does."""
    return set(module.dilation) == {1} and module.padding_mode == "zeros"  # type: ignore[arg-type]


class LoRAPiece(Piece):
    """A and B at one site. On a bare parameter it reads as W + s·BA; elsewhere it runs beside the host's call."""

    lora_bias: nn.Parameter | None

    def __init__(self, method: LoRA, site: Site) -> None:
        super().__init__()
        self.scale = method.scale
        self.dropout = method.dropout
        self.exact = method.precision == "exact"
        self.kind = site.kind
        self.shape = site.weight.shape
        self.groups = int(getattr(site.module, "groups", 1)) if site.kind == "conv" else 1
        self.input_last = not (site.kind == "parameter" and site.transposed)
        _refuse(method, site)
        a, b, keep = initial_factors(method.r, method.init, site, method.scale)
        self.lora_A: Tensor  # a buffer while frozen: nothing can train it, and no optimiser sees it
        if method.freeze_a:
            self.register_buffer("lora_A", a)
        else:
            self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.lora_bias = nn.Parameter(b.new_zeros(b.shape[0])) if method.lora_bias else None
        self.register_buffer("start_A", a.clone() if keep else None)
        self.register_buffer("start_B", b.clone() if keep else None)

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """A₀ and B₀, where their product is not zero."""
        a, b = self._buffers["start_A"], self._buffers["start_B"]
        return None if a is None or b is None else (a, b)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.plain and not args and not kwargs:
            return kernel.adapted(inner, x, self.lora_A, self.lora_B, self.scale, self.dropout if self.training else 0)
        y = inner(x, *args, **kwargs)
        return y + (self.scale * self.change(inner.module, x)).to(y.dtype)

    @property
    def plain(self) -> bool:
        """Whether this is B A x on a linear, and in the dtype of x: what the kernels compute."""
        return self.kind == "linear" and self.start is None and self.lora_bias is None and not self.exact

    def change(self, host: nn.Module, x: Tensor) -> Tensor:
        """(B A − B₀ A₀) x, in the form that the host computes, with dropout on x."""
        if self.exact and x.is_floating_point():
            x = x.to(self.lora_A.dtype)
        if self.dropout and self.training and self.kind != "embedding":
            x = F.dropout(x, self.dropout)
        if self.start is None:
            return self._product(host, x, self.lora_A, self.lora_B, self.lora_bias)
        # torch chooses how to multiply by strides and by who requires gradients; on contiguous x both go the same way,
        # so that the two products cancel exactly at first.
        x = x.contiguous()
        return self._product(host, x, self.lora_A, self.lora_B, self.lora_bias) - self._product(host, x, *self.start)

    def _product(self, host: nn.Module, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.kind == "embedding":
            return low_rank.embedding(x, a, b, cast("nn.Embedding", host))
        if self.kind == "conv":
            return low_rank.convolution(x, a, b, host, bias)
        return low_rank.linear(x, a, b, bias)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        if type(self) is not LoRAPiece or self.lora_bias is not None:
            return None
        if self.start is None:
            return self.lora_A, self.lora_B, self.scale
        (a, b), (start_a, start_b) = (self.lora_A, self.lora_B), self.start
        return torch.cat([a, start_a]), torch.cat([b, -start_b], dim=1), self.scale

    @classmethod
    def together(cls, pieces: Mapping[int, Piece], bank: Bank) -> Piece | None:
        own = {n: piece for n, piece in pieces.items() if isinstance(piece, LoRAPiece)}
        return BankedLoRA(own, bank) if cls is LoRAPiece and all(piece.plain for piece in own.values()) else None

    def delta(self) -> Tensor:
        """s · (B A − B₀ A₀), in the shape and orientation of the weight."""
        if not self.mergeable:
            raise UnsupportedError("this LoRA crosses the groups of its convolution, which no grouped weight can do")
        change = low_rank.delta(self.lora_A, self.lora_B, self.shape, input_last=self.input_last)
        if self.start is not None:
            change = change - low_rank.delta(*self.start, self.shape)
        return self.scale * (change.T if self.kind == "embedding" else change)

    @property
    def mergeable(self) -> bool:
        return self.groups == 1 or self.lora_A.shape[1] == self.shape[1]

    def weight(self, weight: Tensor) -> Tensor:
        if self.kind == "linear" and self.start is None:  # one sum, without B A by itself
            return torch.addmm(weight.to(self.lora_A.dtype), self.lora_B, self.lora_A, alpha=self.scale)
        return weight + self.delta()

    def bias(self, bias: Tensor | None) -> Tensor | None:
        if self.lora_bias is None:
            return bias
        return self.scale * self.lora_bias if bias is None else bias + self.scale * self.lora_bias

    def file_tensors(self) -> dict[str, Tensor]:
        plain, table = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
        names = table if self.kind == "embedding" else plain
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        if self.start is not None:
            # [A; A₀] and [B, −B₀]: the same change as a plain LoRA of twice the rank, which any reader can use.
            a, b = torch.cat([a, self.start[0]]), torch.cat([b, -self.start[1]], dim=1)
        if self.groups > 1 and self.mergeable:
            a = low_rank.spread_groups(a, self.groups)
        tensors = {names[0]: a, names[1]: b}
        return tensors if self.lora_bias is None else tensors | {"lora_B.bias": self.lora_bias}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        a, b, *bias = tensors.values()
        if self.groups > 1:
            grouped = low_rank.gather_groups(a, self.groups)
            a = a if grouped is None else grouped
            if a.shape != self.lora_A.shape:
                fresh = self.lora_A.new_empty(a.shape)
                self.lora_A = nn.Parameter(fresh) if isinstance(self.lora_A, nn.Parameter) else fresh
        with torch.no_grad():
            rows, columns = self.lora_A.shape[0], self.lora_B.shape[1]
            self.lora_A.copy_(a[:rows])
            self.lora_B.copy_(b[:, :columns])
            if self.start is not None:
                self.start[0].copy_(a[rows:])
                self.start[1].copy_(-b[:, columns:])
            if self.lora_bias is not None:
                self.lora_bias.copy_(bias[0])

    def values_of(self, other: Piece) -> list[tuple[Tensor, Tensor]]:
        """A of a lower rank is filled up with zeros, and another scale goes into B."""
        if type(other) is not type(self):
            raise CheckpointError(f"it is {type(other).__name__}, and {type(self).__name__} here")
        own, its = self._tensors(), other._tensors()
        whole = self.groups == 1 and not (self.kind == "parameter" and len(self.shape) == 3)
        if own.keys() != its.keys():
            raise CheckpointError(f"it has {', '.join(its)}, and there is {', '.join(own)} here")
        if other.scale != self.scale:
            scaled = {name for name in its if name.startswith(("lora_B", "start_B", "lora_bias"))}
            its = {name: t * (other.scale / self.scale) if name in scaled else t for name, t in its.items()}
        return [(tensor, _padded(name, its[name], tensor, whole)) for name, tensor in own.items()]

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


def _padded(name: str, tensor: Tensor, like: Tensor, whole: bool) -> Tensor:
    """`tensor` in the shape of `like`: zeros for the ranks that it lacks, where these are not several times as many
    (`whole`). Raises CheckpointError where it has more ranks, or other sizes.
    """
    dim = 1 if name.endswith("_B") else 0
    more = like.shape[dim] - tensor.shape[dim]
    others = [(a, b) for n, (a, b) in enumerate(zip(tensor.shape, like.shape, strict=False)) if n != dim]
    if tensor.dim() != like.dim() or any(a != b for a, b in others) or more < 0 or (more and not whole):
        raise CheckpointError(
            f"its {name} is {tuple(tensor.shape)}, which does not fit into the {tuple(like.shape)} here"
        )
    if not more:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = more
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _refuse(method: LoRA, site: Site) -> None:
    """Raise UnsupportedError for fields that would have no effect at this site, or a wrong one."""
    if site.kind == "parameter" and method.dropout:
        raise UnsupportedError(
            f"LoRA(dropout={method.dropout}) cannot sit at {site.name}: a bare parameter has no input to drop; "
            "use dropout=0, or an override for this place"
        )
    if method.lora_bias and site.kind in ("parameter", "embedding"):
        raise UnsupportedError(
            f"LoRA(lora_bias=True) cannot sit at {site.name}: a {site.kind} has no bias; exclude it, or lora_bias=False"
        )
    if site.kind == "embedding":
        host = base_class(type(site.module))
        if host.forward is not nn.Embedding.forward and not hasattr(site.module, "embed_scale"):
            raise UnsupportedError(
                f"LoRA cannot sit at {site.name}: {host.__name__} looks its rows up in a way of its own; exclude it, "
                "or train it whole with modules_to_save"
            )
