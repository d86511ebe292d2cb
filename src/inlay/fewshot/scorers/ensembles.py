"""One answer out of several models': a weighted mean of logits or of probabilities.

    s(l | x) = Σ_p w_p s_p(l | x) / Σ_p w_p

PET weighs each pattern by its accuracy on the training rows before any training (Schick & Schütze 2021,
arXiv:2001.07676); LM-BFF averages over demonstrations and templates alike (Gao et al. 2021, arXiv:2012.15723).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from inlay.errors import ConfigError

Space = Literal["logit", "probability"]


def combined(scores: Sequence[Tensor], weights: Sequence[float] | None = None, space: Space = "logit") -> Tensor:
    """The weighted mean of several models' scores (rows, labels); of probabilities, as log-probabilities.

    Raises ConfigError when the weights are not one each, are negative, or are all 0.
    """
    given = [1.0] * len(scores) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(scores) or min(given) < 0 or sum(given) == 0:
        raise ConfigError(f"an ensemble of {len(scores)} needs a weight each, none negative, not all 0; got {given}")
    stacked = torch.stack(list(scores)).double()
    if space == "probability":
        stacked = stacked.softmax(-1)
    shares = torch.tensor(given, dtype=torch.float64) / sum(given)
    mean = torch.einsum("p,p...->...", shares, stacked)
    return (mean.clamp_min(1e-30).log() if space == "probability" else mean).float()
