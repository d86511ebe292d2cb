"""Random indices, each as often as any other to within one: which entry of Uni-LoRA's vector goes where."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def balanced(count: int, length: int, seed: int) -> Tensor:
    """So many indices below `length`, as evenly spread as can be, shuffled: by the very draws that HF peft makes."""
    generator = np.random.default_rng(seed)
    whole, rest = divmod(count, length)
    indices = np.repeat(np.arange(length), whole)
    if rest:
        indices = np.concatenate([indices, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(indices)
    return torch.from_numpy(indices).long()
