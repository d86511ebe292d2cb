"""SHiRA: sparse high-rank adapter (Bhardwaj et al. 2024, arXiv:2406.13175).

    W′ = W + S,     S nonzero at r (in + out) fixed places only

As many numbers as a LoRA of rank r has, each of them added to one entry of W, at places drawn once at random: a change
of high rank to a few percent of the weight, so that adapters are swapped quickly and seldom collide when added. S
starts at zero, so the model starts as the base. The places are kept in the file.

Parameters: r (in + out).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels import positions
from inlay.pieces.linear import DeltaPiece, LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class SHiRA(LinearMethod):
    """W + S with S sparse, at fixed random places: as many numbers as a LoRA of rank r, but of high rank."""

    kind = "shira"
    default_targets = "query,value"
    peft_type = "SHIRA"
    paper = "Bhardwaj et al. 2024, arXiv:2406.13175"
    peft_constants = (("mask_type", "random"),)
    peft_conv1d = False

    r: int = named("r", 32)
    """Sets the number of places, r (in + out); the rank of the change is not bounded by it."""
    random_seed: int | None = named("random_seed", None)
    """Seed of the places, the same for each weight of one shape; None: drawn anew for each weight."""

    def __post_init__(self) -> None:
        self.check_whole("r")
        if self.random_seed is not None:
            self.check_whole("random_seed", least=0)

    def piece(self, site: Site) -> Piece:
        return SHiRAPiece(self, site)


class SHiRAPiece(DeltaPiece):
    """The entries (n) and their places, rows and columns (2, n), by HF peft's names."""

    shira_indices: Tensor

    def __init__(self, method: SHiRA, site: Site) -> None:
        super().__init__(method, site)
        total, count = self.shape[0] * self.shape[1], method.r * sum(self.shape)
        if count > total:
            raise ConfigError(
                f"SHiRA(r={method.r}): {site.name} has {total} entries, fewer than r (in + out) = {count}"
            )
        self.shira_weight = self.start(count, value=0.0)
        flat = positions.drawn(count, total, method.random_seed).sort().values
        places = torch.stack(positions.places(flat, self.shape)[:2])
        self.register_buffer("shira_indices", places.to(site.device))

    def where(self) -> positions.Positions:
        """The places."""
        return positions.Positions(self.shira_indices[0], self.shira_indices[1], self.shape)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return positions.changed(inner, x, self.shira_weight, self.where())

    def form(self, *tensors: Tensor) -> Tensor:
        return positions.scattered(tensors[0], self.where().flat(), self.shape)

    def file_tensors(self) -> dict[str, Tensor]:
        return {"shira_weight": self.shira_weight, "shira_indices": self.shira_indices}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        rows, columns = tensors["shira_indices"].long()
        order = (rows * self.shape[1] + columns).argsort()  # any order means the same, and the kernel needs this one
        super().load_file_tensors({name: tensor[..., order] for name, tensor in tensors.items()})
