"""A and B at one place: LoRA's piece, and what other methods make of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.host import base_class
from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import CheckpointError, UnsupportedError
from inlay.kernels import lora as kernel
from inlay.kernels import low_rank
from inlay.pieces.lora.banked import BankedLoRA
from inlay.pieces.lora.start import initial_factors

if TYPE_CHECKING:
    from inlay.engine.bank import Bank


class LoRAPiece(Piece):
    """A and B at one site. On a bare parameter it reads as W + s·BA; elsewhere it runs beside the host's call."""

    lora_bias: nn.Parameter | None

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__()
        self.scale: float = method.scale
        self.dropout: float = method.dropout
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


def _refuse(method: Any, site: Site) -> None:
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
    refuse_other_lookups(site, "LoRA")


def refuse_other_lookups(site: Site, what: str) -> None:
    """Raise UnsupportedError for an embedding that does more with its ids than to look up their rows."""
    if site.kind == "embedding":
        host = base_class(type(site.module))
        if host.forward is not nn.Embedding.forward and not hasattr(site.module, "embed_scale"):
            raise UnsupportedError(
                f"{what} cannot sit at {site.name}: {host.__name__} looks its rows up in a way of its own; exclude it, "
                "or train it whole with modules_to_save"
            )
