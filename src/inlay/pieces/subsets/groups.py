"""Entries that are chosen together: whole tensors, rows (outputs), columns (inputs), attention heads.

A group's score is the mean over its entries, so that its size decides nothing; a random one is drawn for the group. An
entry of a bias or a norm is a row of its own. Heads that share keys and values (grouped queries) are one group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from inlay.engine.sites import CONVOLUTIONS, Site, SiteIndex, is_conv1d
from inlay.errors import TargetError
from inlay.kernels import exact_top_k
from inlay.pieces.subsets import head_slices

GRANULARITIES = ("element", "row", "column", "head", "tensor")
Entries = dict[str, Tensor | None]


@dataclasses.dataclass(frozen=True)
class Block:
    """One axis of one parameter, cut into slices: each a group, or a part of one."""

    name: str
    shape: tuple[int, ...]
    axis: int | None
    """None: the whole."""
    groups: Tensor
    """For each index along the axis the number of its group; -1: of none."""

    def sums(self, scores: Tensor) -> Tensor:
        """The sum of the scores in each slice."""
        if self.axis is None:
            return scores.double().sum()[None]
        return scores.double().movedim(self.axis, 0).flatten(1).sum(1) if scores.dim() > 1 else scores.double()

    def entries(self, chosen: Tensor) -> Tensor | None:
        """Flat indices of the slices whose groups are chosen (a mask over groups)."""
        taken = chosen[self.groups] & (self.groups >= 0)
        if self.axis is None:
            return None if bool(taken) else torch.zeros(0, dtype=torch.int64)
        mask = taken.view([-1 if axis == self.axis else 1 for axis in range(len(self.shape))]).expand(self.shape)
        return mask.flatten().nonzero().flatten()


def blocks(granularity: str, index: SiteIndex, sites: Sequence[Site]) -> list[Block]:
    """The parameters of these places, cut into groups that are numbered from 0."""
    if granularity == "head":
        return _heads(index, sites)
    found: list[Block] = []
    start = 0
    for site in sites:
        shape = tuple(site.weight.shape)
        axis = None if granularity == "tensor" else _axis(granularity, site)
        size = 1 if axis is None else shape[axis]
        found.append(Block(site.name, shape, axis, torch.arange(start, start + size)))
        start += size
    return found


def choose(
    parts: Sequence[Block],
    numbers: Callable[[], Iterable[Tensor]],
    names: Sequence[str],
    budget: int | None,
    threshold: float | None,
    seed: int | None,
) -> Entries:
    """The entries of the best groups that fit into the budget, or reach the threshold. `seed`: by chance instead."""
    count = 1 + max(int(part.groups.max()) for part in parts)
    sizes, sums = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.float64)
    for part in parts:
        kept = part.groups >= 0
        each = math.prod(part.shape) // max(1, len(part.groups))
        sizes.index_add_(0, part.groups[kept], torch.full((int(kept.sum()),), each))
    if seed is not None:
        means = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    else:
        by_name: dict[str, list[Block]] = {}
        for part in parts:
            by_name.setdefault(part.name, []).append(part)
        for name, scores in zip(names, numbers(), strict=True):
            for part in by_name.get(name, ()):
                kept = part.groups >= 0
                sums.index_add_(0, part.groups[kept], part.sums(scores).cpu()[kept])
        means = sums / sizes
    if budget is None:
        assert threshold is not None
        chosen = means >= threshold
    else:
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[exact_top_k.packed(means, sizes, budget)] = True
    return _united(parts, chosen)


def _united(parts: Sequence[Block], chosen: Tensor) -> Entries:
    found: Entries = {}
    for part in parts:
        here, before = part.entries(chosen), found.get(part.name)
        if here is not None and before is not None:
            here = torch.unique(torch.cat([before, here]))
        found[part.name] = here
    return {name: where for name, where in found.items() if where is None or len(where)}


def _axis(granularity: str, site: Site) -> int:
    """Where the outputs of a parameter are, or its inputs; of a stack of experts, where the experts are."""
    if site.weight.dim() < 2 or (site.weight.dim() > 2 and not isinstance(site.module, CONVOLUTIONS)):
        return 0
    return int((granularity == "column") != is_conv1d(site.module))


def _heads(index: SiteIndex, sites: Sequence[Site]) -> list[Block]:
    wanted = {site.name: tuple(site.weight.shape) for site in sites}
    found: list[Block] = []
    number = 0
    for heads in every_head(index):
        parts = {name: part for name, part in heads.items() if name in wanted}
        for name, part in parts.items():
            groups = torch.full((wanted[name][part.axis],), -1)
            groups[part.indices] = number
            found.append(Block(name, wanted[name], part.axis, groups))
        number += bool(parts)
    if not found:
        raise TargetError(f"granularity='head': {type(index.model).__name__} has no attention among the targets")
    return found


def every_head(index: SiteIndex) -> list[dict[str, head_slices.Slice]]:
    """For each head, or heads with one key and value: its slices, by parameter."""
    found: list[dict[str, head_slices.Slice]] = []
    for group in head_slices._attentions(index):
        if not {"query", "key", "value", "output"} <= {role for site in group for role in site.roles}:
            continue
        query = next(site for site in group if "query" in site.roles)
        key = next(site for site in group if "key" in site.roles)
        width = query.in_features if query.parameter == "in_proj_weight" else query.out_features
        heads = width // head_slices._head_size(index, query)
        shared = 1 if key is query else query.out_features // key.out_features
        found += [head_slices._slices(index, group, range(head, head + shared)) for head in range(0, heads, shared)]
    return found
