"""Parallel, BatchSplit and Split in one model: a slice of x through each branch, the outputs end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.combining.bound import BoundBranches, Parts, banked
from inlay.combining.inner import Known, Once
from inlay.combining.repeating import RepeatPiece
from inlay.engine.composition import names_in
from inlay.engine.host import Inlays, Inner
from inlay.engine.piece import Piece
from inlay.engine.sites import Site, kind_of
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.bottlenecks.bottleneck import first_of

CHANNELS_SECOND = (nn.GroupNorm, nn.modules.batchnorm._NormBase)


class BoundDivided(BoundBranches):
    """Base: each branch has a slice of the one tensor that a host is called with."""

    axis = 0

    def sizes(self, x: Tensor, host: nn.Module) -> Sequence[int]:
        """How much of x each branch has. UnsupportedError where x cannot be divided so."""
        raise NotImplementedError

    def compute(self, inner: Inner, reads: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs of the branches, end to end."""
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise UnsupportedError(
                f"{self.of!r} cannot divide a call of {type(inner.module).__name__} with more than one tensor"
            )
        x, start = args[0], 0
        whole, outputs = Once(lambda: inner(x)), []
        for branch, size in zip(self.branches, self.sizes(x, inner.module), strict=True):
            if size:
                part = x.narrow(self.axis, start, size).contiguous()
                rest = inner if reads else Known(inner, (part,), self._slice(whole, start, size))
                outputs.append(self.through(branch, rest, reads, (part,), {}))
                start += size
        firsts = [output[0] if isinstance(output, tuple) else output for output in outputs]
        return first_of(outputs[0], lambda _: torch.cat(firsts, self.axis))

    def _slice(self, whole: Once, start: int, size: int) -> Callable[[], Any]:
        return lambda: first_of(whole(), lambda h: h.narrow(self.axis, start, size))


class BoundParallel(BoundDivided):
    """Each branch has its own copy of the batch."""

    def sizes(self, x: Tensor, host: nn.Module) -> Sequence[int]:
        """Equal parts."""
        count = len(self.branches)
        if x.dim() < 2 or x.shape[0] % count:
            raise UnsupportedError(
                f"{self.of!r}: {type(host).__name__} was called with shape {tuple(x.shape)}, which has not the rows of "
                f"{count} copies of the batch; leave that place out of the adapters"
            )
        return [x.shape[0] // count] * count

    def start(self, model: nn.Module, parts: Parts) -> None:
        """ConfigError where the batch would be repeated twice."""
        if sum(isinstance(part, BoundParallel) for part in parts) > 1:
            raise ConfigError(f"{self.of!r} beside another Parallel: one is enough; put all branches into it")
        super().start(model, parts)

    def entries(self) -> list[Piece]:
        """The batch is repeated on its way in."""
        return [*super().entries(), RepeatPiece(len(self.branches), repr(self.of))]


class BoundBatchSplit(BoundDivided):
    """The rows by number. LoRAs run as `per_row` runs them: together."""

    def sizes(self, x: Tensor, host: nn.Module) -> Sequence[int]:
        """The sizes, times the beams of a row."""
        sizes: tuple[int, ...] = self.of.sizes  # type: ignore[attr-defined]
        if x.dim() < 2 or x.shape[0] % sum(sizes):
            raise UnsupportedError(
                f"{self.of!r} is for batches of {sum(sizes)} rows, and {type(host).__name__} was called with shape "
                f"{tuple(x.shape)}: give sizes that sum to the rows"
            )
        return [size * (x.shape[0] // sum(sizes)) for size in sizes]

    def piece(self, inlays: Inlays, parameter: str | None) -> Piece | None:
        """All branches as one piece where that exists."""
        sizes = self.of.sizes  # type: ignore[attr-defined]
        firsts = [names_in(branch)[0] if branch else None for branch in self.branches]
        rows = [name for name, size in zip(firsts, sizes, strict=True) for _ in range(size)]
        found = banked(self, inlays, parameter, lambda bank: bank.choose(rows, bank.gates.device))
        return found or super().piece(inlays, parameter)


class BoundSplit(BoundDivided):
    """The tokens by number."""

    axis = 1

    def takes(self, site: Site, piece: Piece) -> bool:
        """Whether a piece treats tokens alike."""
        mixes = kind_of(site.module) == "conv" or isinstance(site.module, CHANNELS_SECOND)
        return super().takes(site, piece) and not mixes

    def sizes(self, x: Tensor, host: nn.Module) -> Sequence[int]:
        """The sizes."""
        sizes: tuple[int, ...] = self.of.sizes  # type: ignore[attr-defined]
        if x.dim() < (2 if isinstance(host, nn.Embedding) else 3) or x.shape[1] != sum(sizes):
            raise UnsupportedError(
                f"{self.of!r} is for {sum(sizes)} tokens, and {type(host).__name__} was called with shape "
                f"{tuple(x.shape)}: give sizes that sum to the tokens, and leave out places without tokens (heads)"
            )
        return sizes
