"""WaveFT: fine-tuning in the wavelet domain (Bilican et al. 2025, arXiv:2505.12532).

    W′ = W + s · IDWT(S),     S with n trained numbers at fixed random places, 0 elsewhere

IDWT is one step of the inverse discrete wavelet transform in two dimensions. Each number changes a patch of W, 2 × 2
entries with Haar's wavelet, so that the change runs as a sparse matrix. The places follow from the seed and are not in
the file. The numbers start at zero, so the model starts as the base.

Parameters: n.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels import positions, wavelets
from inlay.pieces.linear import DeltaPiece, LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveFT(LinearMethod):
    """W + s · IDWT(S): n numbers at random places of the change's wavelet transform."""

    kind = "waveft"
    default_targets = "query,value"
    peft_type = "WAVEFT"
    paper = "Bilican et al. 2025, arXiv:2505.12532"
    peft_constants = (("bias", "none"), ("proportional_parameters", False))

    n_frequency: int = named("n_frequency", 2592, "n_frequency_pattern")
    """n, the numbers for each weight."""
    scaling: float = named("scaling", 25.0)
    """s."""
    wavelet_family: str = named("wavelet_family", "db1")
    """Daubechies' wavelet, by its vanishing moments: db1 (Haar's) to db10."""
    use_idwt: bool = named("use_idwt", True)
    """False: no transform, the numbers are added to W where they are."""
    random_loc_seed: int = named("random_loc_seed", 777)
    """Seed of the places, the same for each weight of one shape."""

    def __post_init__(self) -> None:
        self.check_whole("n_frequency")
        self.check_whole("random_loc_seed", least=0)
        self.check_number("scaling")
        self.check_choice("wavelet_family", wavelets.FAMILIES)

    def piece(self, site: Site) -> Piece:
        return WaveFTPiece(self, site)


class WaveFTPiece(DeltaPiece):
    """The numbers c (n), by HF peft's name, and where they go: into entries of W, or into rows of both bands."""

    slots: Tensor
    weights: Tensor
    places: Tensor
    both: Tensor

    def __init__(self, method: WaveFT, site: Site) -> None:
        super().__init__(method, site)
        n, self.scale, entries = method.n_frequency, method.scaling, self.shape[0] * self.shape[1]
        if n > entries:
            raise ConfigError(f"WaveFT(n_frequency={n}): {site.name} has only {entries} places")
        self.waveft_spectrum = self.start(n, value=0.0)
        flat = positions.drawn(n, entries, method.random_loc_seed)
        both = wavelets.filters(method.wavelet_family)
        self.sparse = not method.use_idwt or 4 * n * both.shape[1] ** 2 <= entries
        where = wavelets.coefficients(flat, self.shape, both.shape[1])
        self.band = where.half
        if method.use_idwt:
            slots, weights = (wavelets.patches if self.sparse else wavelets.strips)(where, self.shape, both)
        else:
            slots, weights = flat[:, None], torch.ones(n, 1)
        places, slots = torch.unique(slots, return_inverse=True) if self.sparse else (flat, slots)
        for name, tensor in (("slots", slots), ("weights", weights), ("places", places), ("both", both)):
            kept = tensor.to(self.place["dtype"]) if tensor.is_floating_point() else tensor
            self.register_buffer(name, kept.to(site.device), persistent=False)

    def entries(self, c: Tensor) -> tuple[Tensor, positions.Positions]:
        """The change as values at positions."""
        values = wavelets.spread(c, wavelets.Spread(self.slots, self.weights), len(self.places))
        return self.scale * values, positions.places(self.places, self.shape)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.sparse:
            return super().forward(inner, x)
        return positions.changed(inner, x, *self.entries(self.waveft_spectrum))

    def form(self, *tensors: Tensor) -> Tensor:
        (c,) = tensors
        if self.sparse:
            values, where = self.entries(c)
            return positions.scattered(values, where.flat(), self.shape)
        bands = wavelets.spread(c, wavelets.Spread(self.slots, self.weights), 2 * self.band * self.shape[1])
        return self.scale * wavelets.raised(bands.view(2, self.band, -1), self.shape, self.both)
