"""FourierFT: fine-tuning in the Fourier domain (Gao et al. 2024, arXiv:2405.03003).

    W′ = W + s · Re ifft2(S),     S (out, in) with n trained numbers at fixed random frequencies, 0 elsewhere

Each number is a wave across the whole weight. Few numbers run as a LoRA of rank 2 n with waves for factors; for many
the change is formed by fast Fourier transforms. The frequencies follow from the seed and are not in the file.

Parameters: n.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.errors import ConfigError
from inlay.kernels import fourier
from inlay.pieces.linear import DeltaPiece, LinearMethod, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFT(LinearMethod):
    """W + s · Re ifft2(S): n numbers at random frequencies of the change."""

    kind = "fourierft"
    default_targets = "query,value"
    peft_type = "FOURIERFT"
    paper = "Gao et al. 2024, arXiv:2405.03003"
    peft_constants = (("bias", "none"),)

    n_frequency: int = named("n_frequency", 1000, "n_frequency_pattern")
    """n, the numbers for each weight."""
    scaling: float = named("scaling", 150.0)
    """s; beside it the transform divides by out · in."""
    random_loc_seed: int = named("random_loc_seed", 777)
    """Seed of the frequencies, the same for each weight of one shape."""
    init: Literal["zeros", "gaussian"] = "zeros"
    """How the numbers start. The paper and HF peft start with gaussian, and so not as the base."""

    def __post_init__(self) -> None:
        self.check_whole("n_frequency")
        self.check_whole("random_loc_seed", least=0)
        self.check_number("scaling")
        self.check_choice("init", ("zeros", "gaussian"))

    def piece(self, site: Site) -> Piece:
        return FourierFTPiece(self, site)


class FourierFTPiece(DeltaPiece):
    """The numbers c (n), by HF peft's name, and their frequencies."""

    def __init__(self, method: FourierFT, site: Site) -> None:
        super().__init__(method, site)
        self.n, self.scale, entries = method.n_frequency, method.scaling, self.shape[0] * self.shape[1]
        if self.n > entries:
            raise ConfigError(f"FourierFT(n_frequency={self.n}): {site.name} has only {entries} frequencies")
        self.fourierft_spectrum = self.start(self.n, value=0.0)
        if method.init == "gaussian":
            nn.init.normal_(self.fourierft_spectrum)
        for name, tensor in fourier.frequencies(self.n, self.shape, method.random_loc_seed)._asdict().items():
            self.register_buffer(name, tensor.to(site.device), persistent=False)

    def where(self) -> fourier.Frequencies:
        """The frequencies."""
        return fourier.Frequencies(*(self.get_buffer(name) for name in fourier.Frequencies._fields))

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        if 16 * self.n > min(self.shape):
            return None
        a, b = fourier.waves(self.fourierft_spectrum, self.where(), self.shape)
        return a, b, self.scale / (self.shape[0] * self.shape[1])

    def form(self, *tensors: Tensor) -> Any:
        return self.scale * fourier.transformed(tensors[0], self.where(), self.shape)
