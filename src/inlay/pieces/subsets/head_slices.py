"""The rows and columns of an attention's projections that belong to single heads, and the piece that trains them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inlay.engine.parameters import parameter_sites
from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.structure import ancestors
from inlay.errors import ConfigError, TargetError, UnsupportedError

SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
INPUTS = ("query", "key", "value")


class Slice(NamedTuple):
    """The entries of one parameter along one axis."""

    axis: int
    indices: list[int]


class HeadSlice(Piece):
    """W'[indices] = `value` along one axis; every other entry is W's own."""

    indices: Tensor

    def __init__(self, site: Site, part: Slice) -> None:
        super().__init__()
        weight = site.weight.detach()
        if not weight.is_floating_point():
            raise UnsupportedError(f"{site.name} holds {weight.dtype} codes (a quantised weight): it cannot be trained")
        self.axis = part.axis
        self.register_buffer("indices", torch.tensor(part.indices, device=weight.device), persistent=False)
        self.value = nn.Parameter(weight.index_select(part.axis, self.indices).to(trainable_dtype(weight.dtype)))

    def weight(self, weight: Tensor) -> Tensor:
        return weight.index_copy(self.axis, self.indices, self.value.to(weight.dtype))

    def file_tensors(self) -> dict[str, Tensor]:
        return {"": self.value}


def head_slices(index: SiteIndex, heads: Mapping[int | str, Sequence[int]]) -> dict[str, Slice]:
    """By parameter name, what belongs to these heads: rows of query, key and value, columns of the output projection.

    Keys are layers, or targets that name attentions. Heads that share keys and values (grouped queries) train them as
    well. Raises TargetError and ConfigError for a layer or head that is not there, UnsupportedError for projections
    that hold several of query, key and value in an order that is not known.
    """
    found: dict[str, Slice] = {}
    groups = _attentions(index) if heads else []
    for key, wanted in heads.items():
        chosen = [group for group in groups if _named(index, group, key)]
        if not chosen:
            raise TargetError(f"heads={{{key!r}: …}} names no attention in {type(index.model).__name__}")
        for group in chosen:
            for name, part in _slices(index, group, wanted).items():
                before = found[name].indices if name in found else []
                found[name] = Slice(part.axis, sorted({*before, *part.indices}))
    return found


def _attentions(index: SiteIndex) -> list[list[Site]]:
    """The projections of each attention."""
    blocks = {site.path for site in index.sites if "block" in site.roles}
    groups: dict[tuple[str, bool], list[Site]] = {}
    for site in index.sites:
        if site.kind in ("linear", "parameter") and site.roles & {*INPUTS, "output"}:
            block = next((above for above in ancestors(site.path) if above in blocks), "")
            groups.setdefault((block, "cross" in site.roles), []).append(site)
    return list(groups.values())


def _named(index: SiteIndex, group: list[Site], key: int | str) -> bool:
    if isinstance(key, int):
        return any(site.layer is not None and site.layer == key + (key < 0) * (site.depth or 0) for site in group)
    inside = {site.path for site in parameter_sites(index, key, what="PartialFineTuning(heads=…)")}
    return any(site.path in inside for site in group)


def _slices(index: SiteIndex, group: list[Site], wanted: Sequence[int]) -> dict[str, Slice]:
    query, key, value, output = (next((s for s in group if role in s.roles), None) for role in (*INPUTS, "output"))
    if query is None or key is None or value is None or output is None:
        raise UnsupportedError(f"heads: {group[0].name} is in an attention whose projections are not all known")
    size = _head_size(index, query)
    if query.parameter == "in_proj_weight":
        _check(query, wanted, query.in_features // size)
        starts = [part * query.in_features + head * size for part in range(3) for head in wanted]
    else:
        apart = len({id(query), id(key), id(value)}) == 3 and query.kind == "linear"
        if not apart or query.out_features != output.in_features:
            raise UnsupportedError(
                f"heads: {query.name} does not hold the queries of the heads alone, one after another, so which of its "
                "rows belong to a head is not known; train the whole attention, as in PartialFineTuning(targets=…)"
            )
        _check(query, wanted, query.out_features // size)
        starts = [head * size for head in wanted]
    sharing = 1 if key is query else query.out_features // key.out_features
    shared = [head // sharing * size for head in wanted]
    parts = [(query, starts), *([] if key is query else [(key, shared), (value, shared)])]
    found: dict[str, Slice] = {}
    for site, begins in parts:
        rows = _runs(begins, size)
        found[_join(site, "weight")] = Slice(1 if site.transposed else 0, rows)
        if site.bias is not None:
            found[_join(site, "bias")] = Slice(0, rows)
    columns = _runs((head * size for head in wanted), size)
    return found | {_join(output, "weight"): Slice(0 if output.transposed else 1, columns)}


def _join(site: Site, name: str) -> str:
    """The name of a projection's weight or bias."""
    if site.parameter == "in_proj_weight":
        name = f"in_proj_{name}"
    return f"{site.path}.{name}" if site.path else name


def _runs(starts: Iterable[int], size: int) -> list[int]:
    return sorted({start + offset for start in starts for offset in range(size)})


def _check(query: Site, wanted: Sequence[int], count: int) -> None:
    for head in wanted:
        if not 0 <= head < count:
            raise ConfigError(f"heads: there is no head {head} in the attention of {query.name}, only 0 to {count - 1}")


def _head_size(index: SiteIndex, query: Site) -> int:
    """Width of one head, as the modules around the projection or their configs say it."""
    modules = dict(index.model.named_modules())
    width = query.in_features if query.parameter == "in_proj_weight" else query.out_features
    holders: list[Any] = [modules[above] for above in ancestors(query.path)]
    for holder in [*holders, *(getattr(holder, "config", None) for holder in holders)]:
        for name in SIZES:
            if isinstance(size := getattr(holder, name, None), int) and size and width % size == 0:
                return size
        for name in COUNTS:
            if isinstance(count := getattr(holder, name, None), int) and count and width % count == 0:
                return width // count
    raise UnsupportedError(f"heads: the modules around {query.name} do not say how many heads they have")
