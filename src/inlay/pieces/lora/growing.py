"""B (A ⊙ E) at one place, to which ranks are added in training: IncreLoRA's piece.

The ranks come in blocks, each with parameters of its own, so that an optimiser's state for the old ones stays as it is
when new ones come. The last block may be the *reserve*: its A and B learn already, its E is a small constant.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inlay.engine.piece import Method
from inlay.engine.sites import Site
from inlay.kernels.sensitivity import watched
from inlay.pieces.linear import DeltaPiece

RESERVE = 1e-5
"""E of the reserve: enough for its A and B to get a gradient, too little to change an output."""
STD = 0.02
"""Of the numbers that A and B start from."""


class GrowingLoRAPiece(DeltaPiece):
    """Blocks of A (k, in), B (out, k) and E (k, 1); the reserve, if there is one, is the last of A and B."""

    def __init__(self, method: Method, site: Site, rank: int, alpha: float, divisor: float | None) -> None:
        super().__init__(method, site)
        self.alpha, self.divisor = alpha, divisor
        self.lora_A, self.lora_B, self.lora_E = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        self.probe: Tensor | None = None
        self.extend(rank)
        self.lora_E.append(self.start(rank, 1, value=0.0))

    # -- how many ----------------------------------------------------------------------------------------------------

    @property
    def current_rank(self) -> int:
        """Ranks that count: all but the reserve."""
        return sum(len(block) for block in self.lora_E)

    @property
    def reserve(self) -> int:
        """Ranks in the reserve."""
        return len(self.lora_A[-1]) if len(self.lora_A) > len(self.lora_E) else 0

    @torch.no_grad()
    def extend(self, count: int) -> None:
        """Add a block of new ranks, as reserve."""
        place = self.lora_A[0] if len(self.lora_A) else torch.empty(0, **self.place)  # the model may have been moved
        for blocks, shape in ((self.lora_A, (count, self.shape[1])), (self.lora_B, (self.shape[0], count))):
            blocks.append(nn.Parameter(place.new_empty(shape).normal_(std=STD)))

    @torch.no_grad()
    def admit(self) -> None:
        """Make the reserve count: its E goes on from where it stood, as a parameter."""
        self.lora_E.append(nn.Parameter(self.lora_A[-1].new_full((self.reserve, 1), RESERVE)))

    def drop(self) -> None:
        """Take the reserve away."""
        self.lora_A, self.lora_B = nn.ParameterList(self.lora_A[:-1]), nn.ParameterList(self.lora_B[:-1])

    # -- what it computes --------------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """s = alpha / divisor; without a divisor it is the rank here, and s falls as that grows."""
        return self.alpha / (self.current_rank + 1e-5 if self.divisor is None else self.divisor)

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and E of all blocks as one; the reserve's constant is the end of E."""
        a, b, e = list(self.lora_A), list(self.lora_B), list(self.lora_E)
        if len(a) > len(e):
            e.append(a[-1].new_full((a[-1].shape[0], 1), RESERVE))
        return (a[0], b[0], e[0]) if len(a) == 1 else (torch.cat(a), torch.cat(b, 1), torch.cat(e))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        a, b, e = self.joined()
        return a * e, b, self.scale

    def forward(self, inner: object, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y: Tensor = super().forward(inner, x, *args, **kwargs)
        if self.probe is None or not torch.is_grad_enabled():
            return y
        with torch.no_grad():
            a, b, scale = self.factors()
        return watched(y, x, a, b, scale, self.probe)

    def watch(self, on: bool) -> None:
        """From now on, gather in `probe.grad` how much the loss depends on ΔW, or do so no more."""
        device = self.lora_A[0].device
        self.probe = torch.zeros((), dtype=torch.float32, device=device, requires_grad=True) if on else None

    # -- files: one A, B and E, and the sizes of the blocks, that of the reserve last (0: none) ------------------------

    def sizes(self) -> Tensor:
        """Ranks in each block; a last number for those in reserve."""
        counts = [len(block) for block in self.lora_E]
        return torch.tensor([*counts, self.reserve], dtype=torch.int64)

    def file_tensors(self) -> dict[str, Tensor]:
        a, b, e = (tensor.detach() for tensor in self.joined())
        return {"lora_A": a, "lora_B": b, "lora_E": e, "lora_sizes": self.sizes()}

    def resize(self, sizes: list[int]) -> None:
        """Make room for blocks of these sizes, in the order of `sizes`."""
        *learnt, reserve = sizes
        self.lora_A, self.lora_B, self.lora_E = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for count in [*learnt, *([reserve] if reserve else [])]:
            self.extend(count)
        self.lora_E.extend(self.start(count, 1, value=0.0) for count in learnt)

    @torch.no_grad()
    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:  # type: ignore[override]
        counts = [len(block) for block in self.lora_A]
        for name, dim in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
            for block, value in zip(getattr(self, name), torch.split(tensors[name], counts, dim), strict=False):
                block.copy_(value)
