"""Methods on linears whose pieces share tensors: frozen random projections, a bank of vectors.

What is shared is a module, the same child of every piece of an adapter: it is moved, copied and pickled once, and goes
with the last piece. Its tensors stand at the root of HF peft's file, `base_model.<name>`. Those that a seed gives are
drawn as peft draws them, so that a file without them is complete too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.piece import Piece, take, trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels.choice import compute_dtype
from inlay.pieces.linear import DeltaPiece, LinearMethod

Placed = Sequence[tuple[Site, Piece]]


class Shared(nn.Module):
    """What all pieces of an adapter read."""

    def root_tensors(self) -> dict[str, Tensor]:
        """Its tensors by their names in a file."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharingMethod(LinearMethod):
    """A method whose pieces have one `Shared` among them."""

    common: ClassVar[frozenset[str]] = frozenset({"r"})
    """Fields that decide what is shared, and so cannot differ from place to place."""

    def share(self, placed: Placed) -> Shared:
        """What these pieces share."""
        raise NotImplementedError

    def writes(self, name: str) -> bool:
        """Whether a file holds this shared tensor; others are read where a file has them all the same."""
        return True

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        for name in sorted({name for fields in self.overrides.values() for name in fields} & self.common):
            raise ConfigError(f"{type(self).__name__} shares what {name} decides: it cannot be overridden at a place")
        placed = super().build(model, sites)
        shared = self.share(placed)
        for _, piece in placed:
            piece.shared = shared
        return placed

    # -- files -------------------------------------------------------------------------------------------------------

    def export(self, pieces: Placed) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        tensors, extra = super().export(pieces)
        roots = {f"base_model.{name}": t for name, t in shared_by(pieces).root_tensors().items() if self.writes(name)}
        return {**tensors, **roots}, extra

    def import_(self, pieces: Placed, tensors: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
        super().import_(pieces, tensors, extra)
        for name, own in shared_by(pieces).root_tensors().items():
            key = f"base_model.{name}"
            if self.writes(name) or key in tensors:
                with torch.no_grad():
                    own.copy_(take(tensors, key, own.shape))


class SharingPiece(DeltaPiece):
    """A change of one weight; `shared` is set once all pieces are made."""

    def file_tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None}


def projected(
    inner: Any, x: Tensor, a: Tensor, b: Tensor, latent: Callable[[Tensor], Tensor], gain: Tensor | None, p: float
) -> Tensor:
    """W x + gain ⊙ B latent(A x) for A (k, in) and B (out, r) that are frozen, with dropout of p on x.

    As a LoRA whose factors have what is trained multiplied into them, it would take a product more, for the gradient of
    a whole factor. Kept for the backward: A x, what `latent` keeps, and B latent(A x) if there is a gain; x is not.
    """
    dtype = compute_dtype(x)
    h = F.linear(F.dropout(x, p) if p else x, a.to(dtype))
    u = F.linear(latent(h).to(dtype), b.to(dtype))
    y: Tensor = inner(x)
    return y + u.to(y.dtype) if gain is None else torch.addcmul(y, u.to(y.dtype), gain.to(y.dtype))


def shared_by(placed: Placed) -> Shared:
    """The one object of these pieces."""
    shared = placed[0][1].shared
    assert isinstance(shared, Shared)
    return shared


def widest(placed: Placed) -> tuple[int, int]:
    """The largest out and the largest in of these places, each by itself."""
    return max(site.out_features for site, _ in placed), max(site.in_features for site, _ in placed)


def as_trained(placed: Placed, tensor: Tensor) -> Tensor:
    """A tensor drawn in fp32 on the CPU, in the dtype of what is trained and where the first place is."""
    first = placed[0][0]
    return tensor.to(device=first.device, dtype=trainable_dtype(first.dtype))


class Projections(Shared):
    """A (rows, in) and B (out, r), frozen, drawn from a seed with He's uniform start; a place takes its corner of each.

    Buffers of no state dict: nothing trains them, and the seed gives them again.
    """

    def __init__(self, prefix: str, placed: Placed, rows: int, r: int, seed: int) -> None:
        super().__init__()
        (out, width), self.prefix = widest(placed), prefix
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("A", (rows, width)), ("B", (out, r))):
            drawn = nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.float32), generator=generator)
            self.register_buffer(f"{prefix}_{name}", as_trained(placed, drawn), persistent=False)

    def corner(self, out: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """A (rows, width) and B (out, r) for one place of this size."""
        a, b = self.get_buffer(f"{self.prefix}_A"), self.get_buffer(f"{self.prefix}_B")
        return a[:, :width].to(device), b[:out].to(device)
