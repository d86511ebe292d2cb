"""ΔW at chosen entries only: the one form of SHiRA, FISH masks, APET, LT-SFT and diff pruning, and what they share.

    θ′ = θ + S,     S nonzero at n fixed entries, which are what is trained

The base's entries are never written, and those outside the subset not even computed with: they keep their bits under
any optimiser, and in a merged weight. A linear and an embedding take kernels whose gradient is computed at the entries
alone; any other parameter, and one that is tied, is read with the entries added to it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.engine.batches import Batches
from inlay.engine.checkpoint import LOADING
from inlay.engine.host import base_class
from inlay.engine.parameters import with_tied
from inlay.engine.peft_names import peft_targets
from inlay.engine.piece import Method, Piece, trainable_dtype
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import CheckpointError, ConfigError, UnsupportedError
from inlay.kernels import positions, sparse_rows
from inlay.pieces.linear import DeltaPiece
from inlay.pieces.subsets.selection import Choice, candidates, chosen
from inlay.pieces.subsets.subset import Subset

NONE, FEW = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)


class SparseLinear(DeltaPiece):
    """Entries of a linear's W (out, in): their values (n), and their rows and columns (2, n), by HF peft's names."""

    shira_weight: nn.Parameter | None
    shira_indices: Tensor | None

    def __init__(self, method: Method, site: Site, flat: Tensor | None) -> None:
        """`flat`: indices into W (out, in), sorted; None: all of it, without indices."""
        super().__init__(method, site)
        self.resize(self.shape[0] * self.shape[1] if flat is None else len(flat), flat is None)
        if flat is not None and len(flat):
            where = torch.stack(positions.places(flat, self.shape)[:2])
            self.register_buffer("shira_indices", where.to(site.device))

    def resize(self, count: int, whole: bool) -> None:
        """Make room for so many entries, all zero; none have no parameter."""
        self.register_parameter("shira_weight", self.start(count, value=0.0) if count else None)
        places = torch.zeros(2, count, dtype=torch.int32, device=self.place["device"])
        self.register_buffer("shira_indices", None if whole else places)

    def where(self) -> positions.Positions:
        """The places."""
        assert self.shira_indices is not None
        return positions.Positions(self.shira_indices[0], self.shira_indices[1], self.shape)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.shira_weight is None:
            return inner(x)
        if self.shira_indices is None:
            return super().forward(inner, x)
        return positions.changed(inner, x, self.shira_weight, self.where())

    def form(self, *tensors: Tensor) -> Tensor:
        if self.shira_indices is None:
            return tensors[0].view(self.shape)
        values = tensors[0] if tensors else torch.zeros(0, **self.place)
        return positions.scattered(values, self.where().flat(), self.shape)

    def weight(self, weight: Tensor) -> Tensor:
        where = None if self.shira_indices is None else self.where().flat()
        return added(weight, self.shira_weight, where)

    @property
    def count(self) -> int:
        """How many entries."""
        return 0 if self.shira_weight is None else len(self.shira_weight)

    def file_tensors(self) -> dict[str, Tensor]:
        values = torch.zeros(0, **self.place) if self.shira_weight is None else self.shira_weight
        indices = {} if self.shira_indices is None else {"shira_indices": self.shira_indices}
        return {"shira_weight": values, **indices}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if "shira_indices" in tensors and tensors["shira_indices"].numel():
            rows, columns = tensors["shira_indices"].long()
            inside = (columns >= 0) & (columns < self.shape[1])
            order = sorted_places(torch.where(inside, rows * self.shape[1] + columns, -1), math.prod(self.shape))
            tensors = {name: tensor[..., order] for name, tensor in tensors.items()}
        super().load_file_tensors(tensors)


class Entries(nn.Module):
    """Values (n) at places in a flattened parameter; tied parameters share one."""

    values: nn.Parameter | None
    where: Tensor | None

    def __init__(self, site: Site, flat: Tensor | None) -> None:
        super().__init__()
        self.place: dict[str, Any] = {"dtype": trainable_dtype(site.dtype), "device": site.device}
        self.total = site.weight.numel()
        self.resize(self.total if flat is None else len(flat), flat is None)
        if flat is not None:
            self.register_buffer("where", flat.to(site.device))

    def resize(self, count: int, whole: bool) -> None:
        """Make room for so many entries, all zero; none have no parameter."""
        self.register_parameter("values", nn.Parameter(torch.zeros(count, **self.place)) if count else None)
        places = torch.zeros(count, dtype=torch.int64, device=self.place["device"])
        self.register_buffer("where", None if whole else places)


class SparseParameter(Piece):
    """Entries of any parameter, in the order in which it is stored."""

    def __init__(self, entries: Entries) -> None:
        super().__init__()
        self.entries = entries

    def weight(self, weight: Tensor) -> Tensor:
        return added(weight, self.entries.values, self.entries.where)

    @property
    def count(self) -> int:
        """How many entries."""
        return 0 if self.entries.values is None else len(self.entries.values)

    def resize(self, count: int, whole: bool) -> None:
        """Make room for so many entries."""
        self.entries.resize(count, whole)

    def file_tensors(self) -> dict[str, Tensor]:
        values, where = self.entries.values, self.entries.where
        indices = {} if where is None else {"sparse_indices": where}
        return {"sparse_values": torch.zeros(0, **self.entries.place) if values is None else values, **indices}

    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if "sparse_indices" in tensors and tensors["sparse_indices"].numel():
            order = sorted_places(tensors["sparse_indices"], self.entries.total)
            tensors = {name: tensor[order] for name, tensor in tensors.items()}
        super().load_file_tensors(tensors)


class SparseEmbedding(SparseParameter):
    """Entries of an embedding, added to the rows that it looks up."""

    def forward(self, inner: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        y, values, where = inner(ids, *args, **kwargs), self.entries.values, self.entries.where
        if values is None:
            return y
        host = inner.module
        rows, width = host.num_embeddings, host.embedding_dim
        if where is None or torch.compiler.is_compiling():  # how many entries ids have is no constant of a graph
            flat = values if where is None else values.new_zeros(rows * width).index_add(0, where, values)
            return y + F.embedding(ids, flat.view(rows, width), host.padding_idx).to(y.dtype)
        return y + sparse_rows.looked_up(ids, values, where, width, host.padding_idx).to(y.dtype)


def looks_up(site: Site) -> bool:
    """Whether an embedding does nothing else: no scale, no norm to keep below."""
    module: Any = site.module
    plain = base_class(type(module)).forward is nn.Embedding.forward
    return site.kind == "embedding" and plain and module.max_norm is None and not module.scale_grad_by_freq


def added(weight: Tensor, values: Tensor | None, where: Tensor | None) -> Tensor:
    """W with the values added at flat places (None: everywhere); every other entry has its very bits."""
    if values is None:
        return weight
    dtype = torch.promote_types(weight.dtype, values.dtype)
    if where is None:
        return weight.to(dtype) + values.to(dtype).view(weight.shape)
    return weight.to(dtype).reshape(-1).index_add(0, where, values.to(dtype)).view(weight.shape)


def sorted_places(flat: Tensor, total: int) -> Tensor:
    """The order that sorts places read from a file. CheckpointError where they are none, or one is there twice."""
    order = flat.argsort()
    places = flat[order]
    if int(places[0]) < 0 or int(places[-1]) >= total or bool((places.diff() <= 0).any()):
        raise CheckpointError("the adapter file has indices outside the weight, or one twice: it is damaged")
    return order


# -- the methods -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseMethod(Method):
    """Base of the methods that train a subset of the entries. `choice` says which; `subset` when they are known."""

    hosts = frozenset({"parameter"})
    default_targets = "re:.*"
    peft_type: ClassVar[str | None] = "SHIRA"

    subset: Subset | str | None = None
    """The entries, chosen before (`inlay.select`, or `Subset.save`'s file); None: chosen when the adapter is made."""

    def __post_init__(self) -> None:
        if isinstance(self.subset, str):
            object.__setattr__(self, "subset", Subset.read(self.subset))
        if self.subset is not None and (self.targets, self.exclude, self.layers) != (None, None, None):
            raise ConfigError(f"{type(self).__name__}(subset=…): the subset says where; leave targets and layers out")
        if self.overrides:
            raise ConfigError(f"{type(self).__name__} has one budget for all places: leave overrides out")

    def choice(self, sites: Sequence[Site]) -> Choice:
        """How the entries of these parameters are chosen."""
        raise NotImplementedError

    # -- where -------------------------------------------------------------------------------------------------------

    @property
    def wants_data(self) -> bool:
        return self.subset is None

    def prepare(self, model: nn.Module, batches: Any) -> Method:
        """This method with its subset chosen; `batches` as `inlay.select` takes them."""
        index = SiteIndex(model)
        sites = self._candidates(index)
        subset = chosen(index, sites, self.choice(sites), None if batches is None else Batches.of(batches))
        return self.replace(subset=subset, targets=None, exclude=None, layers=None)

    def sites(self, index: SiteIndex) -> list[Site]:
        if isinstance(self.subset, Subset):
            parameters = {site.name: site for site in index.parameters()}
            self.subset.check(index.model, {name: site.weight for name, site in parameters.items()})
            return with_tied(index, [parameters[name] for name in self.subset.entries])
        return with_tied(index, self._candidates(index))

    def _candidates(self, index: SiteIndex) -> list[Site]:
        return candidates(index, self.targets, self.exclude, self.layers, type(self).__name__)

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        index, subset = SiteIndex(model), self.subset
        if not isinstance(subset, Subset):
            once = {id(site.weight): site for site in reversed(sites)}
            first = [site for site in sites if once[id(site.weight)] is site]
            some = Subset({site.name: FEW for site in first}, {}, {})  # a file says how many there are
            subset = some if LOADING.get() else chosen(index, first, self.choice(first), None)
        return placed(self, index, sites, subset)

    # -- files -------------------------------------------------------------------------------------------------------

    def for_file(self) -> Method:
        if not isinstance(self.subset, Subset):
            return self
        names = "|".join(re.escape(name) for name in self.subset.entries)
        return self.replace(subset=None, targets=(f"re:{names}",))

    def file_key(self, site: Site, name: str) -> str:
        return super().file_key(site, name) if site.kind == "linear" else f"base_model.model.{site.name}.{name}"

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        for site, piece in pieces:
            assert isinstance(piece, SparseLinear | SparseParameter)
            names = ("shira_weight", "shira_indices") if site.kind == "linear" else ("sparse_values", "sparse_indices")
            values, indices = (tensors.get(self.file_key(site, name)) for name in names)
            piece.resize(0 if values is None else values.numel(), indices is None and values is not None)
        super().import_(pieces, tensors, extra)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        if any(site.kind != "linear" or site.transposed for site in sites):
            raise UnsupportedError("HF peft's SHiRA sits in the weights of linears alone")
        return {**peft_targets(sites, index), "mask_type": "random", "random_seed": None, "fan_in_fan_out": False}

    def peft_state(self, pieces: Sequence[tuple[Site, Piece]]) -> dict[str, Any]:
        sizes = {(piece.count, sum(piece.shape)) for _, piece in pieces if isinstance(piece, SparseLinear)}
        ranks = {count / size for count, size in sizes}
        whole = any(isinstance(piece, SparseLinear) and piece.shira_indices is None for _, piece in pieces)
        if whole or len(ranks) != 1 or not (r := ranks.pop()) or r != int(r):
            raise UnsupportedError("HF peft's SHiRA has r (in + out) entries in each weight, with one r for all")
        return {"r": int(r)}


def placed(method: Method, index: SiteIndex, sites: Sequence[Site], subset: Subset) -> list[tuple[Site, Piece]]:
    """A piece for each of these parameters: at the call of a linear or embedding, where it is its weight and untied."""
    hosts = {site.path: site for site in index.sites if site.kind == "linear" or looks_up(site)}
    uses: dict[int, list[Site]] = {}
    for site in index.parameters():
        uses.setdefault(id(site.weight), []).append(site)
    shared: dict[int, Entries] = {}
    made: list[tuple[Site, Piece]] = []
    for place in sites:
        site = place
        names = [one.name for one in uses[id(site.weight)]]
        name = next((name for name in names if name in subset.entries), None)
        flat = NONE if name is None else subset.entries[name]
        start = None if name is None or subset.values is None else subset.values[name]
        host = hosts.get(site.path) if site.parameter == "weight" and len(names) == 1 else None
        if host is None or host.kind == "embedding":
            entries = shared.setdefault(id(site.weight), Entries(site, flat))
            piece: Piece = SparseParameter(entries) if host is None else SparseEmbedding(entries)
            values, order, site = entries.values, None, site if host is None else host
        else:
            flat, order = as_shown(host, flat)
            site, linear = host, SparseLinear(method, host, flat)
            piece, values = linear, linear.shira_weight
        if start is not None and values is not None:
            with torch.no_grad():
                values.copy_(start if order is None else start[order])
        made.append((site, piece))
    return made


def as_shown(site: Site, flat: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Places in W as stored, as places in W (out, in), sorted; and the order that sorts them, where it is another."""
    if not site.transposed:
        return flat, None
    o, i = site.out_features, site.in_features
    if flat is None:
        return None, torch.arange(o * i).view(i, o).t().flatten()
    shown = flat % o * i + flat // o
    order = shown.argsort()
    return shown[order], order
