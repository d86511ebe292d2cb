"""Several short examples in one row, each seeing only itself.

Position numbers start again at 0 with every example; from that, transformers builds a block-diagonal attention mask
(where there is no `attention_mask`, and no cache). The first label of each example is ignored, so that no example
predicts the next one:

    sum of losses over packed rows = sum of losses over the examples, each alone

That a model really keeps examples apart is tried on it before training (`check_packing`), because not all do.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from inlay.errors import ConfigError
from inlay.tasks.batches import IGNORE, evaluating


def bins(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Item numbers grouped so that no group's lengths exceed `limit`: best fit, longest first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, group), sorted
    for item in order:
        at = bisect.bisect_left(room, (lengths[item], -1))
        left, group = room.pop(at) if at < len(room) else (limit, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(item)
        if left > lengths[item]:
            bisect.insort(room, (left - lengths[item], group))
    return [sorted(group) for group in groups]


def pack(examples: Sequence[dict[str, Any]], limit: int) -> list[dict[str, list[int]]]:
    """Rows of input_ids, position_ids and labels, each of at most `limit` tokens."""
    rows = []
    for group in bins([len(example["input_ids"]) for example in examples], limit):
        row: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
        for index in group:
            ids, labels = examples[index]["input_ids"], examples[index]["labels"]
            row["input_ids"] += ids
            row["position_ids"] += range(len(ids))
            row["labels"] += [IGNORE, *labels[1:]]
        rows.append(row)
    return rows


def check_packing(model: PreTrainedModel) -> None:
    """Raise ConfigError when what comes before it in a packed row changes an example's outputs.

    Sets `config.use_cache = False` (generation has its own setting): with a cache, transformers takes positions that
    start again for a continuation, and builds no block-diagonal mask.
    """
    model.config.use_cache = False
    device = next(model.parameters()).device
    size = min(int(model.get_input_embeddings().num_embeddings), 64)  # type: ignore[arg-type]
    row = torch.arange(8, device=device).remainder(size)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    with evaluating(model):
        packed = model(input_ids=row, position_ids=positions).logits.float()
        alone = model(input_ids=row[:, 4:], position_ids=positions[:, 4:]).logits.float()
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2
    if packed.shape[1] != 8 or (packed[:, 4:] - alone).abs().max() > tolerance * alone.abs().max():
        raise ConfigError(
            f"this {model.config.model_type} model, with what is attached to it, does not keep packed examples "
            f"apart: set task.packing=false"
        )
