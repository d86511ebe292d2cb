"""WaveFT: fine-tuning in the wavelet domain (Bilican et al. 2025, arXiv:2505.12532).

    W′ = W + s · IDWT(S),     S with n trained numbers at fixed random places, 0 elsewhere

IDWT is one step of the inverse discrete wavelet transform in two dimensions. Each number changes a patch of W, 2 × 2
entries with Haar's wavelet, so that the change runs as a sparse matrix. The places follow from the seed and are not in
the file. The numbers start at zero, so the model starts as the base.

Parameters: n.
"""

from __future__ import annotations

import dataclasses

from inlay.engine.piece import Piece
from inlay.engine.sites import Site
from inlay.kernels import wavelets
from inlay.pieces.deltas.wavelet_entries import WaveFTPiece
from inlay.pieces.linear import LinearMethod, named


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
