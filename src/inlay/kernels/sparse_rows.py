"""What sparse entries S (rows, width) add to the rows that an embedding looks up: S[ids], without S.

Entry k is at row_k, column_k, sorted; those of one id lie side by side. FLOPs and bytes: those of the entries that are
looked up and of the output, whatever the vocabulary; the gradient is formed for the values alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def looked_up(ids: Tensor, values: Tensor, flat: Tensor, width: int, frozen_id: int | None = None) -> Tensor:
    """S[ids], (…, width), for values (n) at sorted indices (n) into the flattened S. `frozen_id` gets no gradient."""
    tokens = ids.reshape(-1)
    begins = torch.searchsorted(flat, tokens * width)
    counts = torch.searchsorted(flat, (tokens + 1) * width) - begins
    token = torch.repeat_interleave(counts)
    # The number of an entry among its token's own: its number among all, less where its token's begin.
    entry = torch.arange(len(token), device=flat.device) - (counts.cumsum(0) - counts - begins)[token]
    found = values[entry]
    if frozen_id is not None:
        found = torch.where(tokens[token] == frozen_id, found.detach(), found)
    places = token * width + flat[entry] % width
    return found.new_zeros(tokens.numel() * width).index_add(0, places, found).view(*ids.shape, width)
