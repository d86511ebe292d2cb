"""Trained entries of a change's wavelet transform: as a sparse matrix while they are few, else through its bands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels import positions, wavelets
from inlay.pieces.linear import DeltaPiece


class WaveFTPiece(DeltaPiece):
    """The numbers c (n), by HF peft's name, and where they go: into entries of W, or into rows of both bands."""

    scale: float
    slots: Tensor
    weights: Tensor
    places: Tensor
    both: Tensor

    def __init__(self, method: Any, site: Site) -> None:
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
