"""Batches of texts for the benchmarks of quality."""

from __future__ import annotations

import torch


def of_like_length(rows: list[dict[str, str]], size: int, order: torch.Generator) -> list[list[dict[str, str]]]:
    """Random batches of rows of like length (sorted within random groups of 20 batches), so that little is padding."""
    mixed = [rows[i] for i in torch.randperm(len(rows), generator=order).tolist()]
    made: list[list[dict[str, str]]] = []
    for first in range(0, len(mixed), 20 * size):
        group = sorted(mixed[first : first + 20 * size], key=lambda row: len(row["text"]))
        made += [group[start : start + size] for start in range(0, len(group) - size + 1, size)]
    return [made[i] for i in torch.randperm(len(made), generator=order).tolist()]
