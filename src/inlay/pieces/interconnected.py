"""Lily's pieces, and what they share: A among neighbours, B among all places of one name and shape."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.peft_names import ambiguous
from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.walk import modules as modules_of
from inlay.errors import CheckpointError, UnsupportedError
from inlay.kernels.routed import routed
from inlay.pieces.projections import Placed, Shared


def grouped(sites: Sequence[Site], names: Sequence[str] | None, longest: bool = True) -> list[list[int]]:
    """The numbers of the sites that share B, group by group: alike in shape and in the name that their paths end in.

    Without names that is the last part of a path. Of several names that fit, the longest counts, or the shortest.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, site in enumerate(sites):
        fitting = [name for name in names or (site.path.rpartition(".")[2],) if site.path.endswith(name)]
        best = (max if longest else min)(fitting, key=len, default=site.path)
        groups.setdefault((best, site.out_features, site.in_features), []).append(number)
    return list(groups.values())


def sharing_targets(names: Any, sharing: Sequence[str] | None, sites: Sequence[Site], index: SiteIndex) -> Any:
    """HF peft's target_modules, by which it shares too, for these sites; `names` where no `sharing` is given.

    Raises UnsupportedError where peft would share otherwise. Of several entries that fit one path it takes any.
    """
    modules, every = {site.path for site in sites}, [path for path, _ in modules_of(index.model)]
    if sharing == ("",):
        names = "|".join(re.escape(path) for path in sorted(modules))
    elif sharing is not None and not ambiguous(sharing, modules, every):
        found = all(any(f".{path}".endswith(f".{name}") for name in sharing) for path in modules)
        names = sorted(sharing) if found else names
    theirs = ("",) if isinstance(names, str) else names
    if any(grouped(sites, theirs, longest) != grouped(sites, sharing) for longest in (True, False)):
        raise UnsupportedError("HF peft shares by target_modules, which cannot say what is shared here")
    return names


class Interconnected(Shared):
    """Every A (r, in) and every B (n r, out) of an adapter; each piece is told the numbers of its two."""

    def __init__(self, placed: Placed, groups: Sequence[Sequence[int]], r: int, stride: int, count: int) -> None:
        super().__init__()
        self.lily_A, self.lily_B = nn.ParameterList(), nn.ParameterList()
        for group in groups:
            first = placed[group[0]][0]
            self.lily_B.append(nn.Parameter(torch.zeros(count * r, first.out_features, **place(first))))
            for position, number in enumerate(group):
                site, piece = placed[number]
                assert isinstance(piece, LilyPiece)
                if position % stride == 0:
                    self.lily_A.append(he_start(site, r, site.in_features))
                piece.a, piece.b = len(self.lily_A) - 1, len(self.lily_B) - 1

    def root_tensors(self) -> dict[str, Tensor]:
        return {}  # peft writes them at every place


class LilyPiece(Piece):
    """The router R (n, r) of one place."""

    shared: Interconnected

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__()
        self.a = self.b = 0
        self.scale = float(method.scale)
        self.lily_router = he_start(site, method.num_B, method.r)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        a, b = (tensor.to(x.device) for tensor in self.factors_shared())
        return routed(inner, x, a, b, self.lily_router, self.scale)

    def factors_shared(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and the B (n r, out) of this place."""
        return self.shared.lily_A[self.a], self.shared.lily_B[self.b]

    def file_tensors(self) -> dict[str, Tensor]:
        a, b = self.factors_shared()
        return {"lily_A.weight": a, "lily_B.weight": b, "lily_router.weight": self.lily_router}


def place(site: Site) -> dict[str, Any]:
    """Where a trained tensor of a site lies, and in which dtype."""
    return {"dtype": trainable_dtype(site.dtype), "device": site.device}


def he_start(site: Site, *shape: int) -> nn.Parameter:
    """A trained tensor with He's uniform start, as HF peft has it."""
    tensor = torch.empty(shape, **place(site))
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
    return nn.Parameter(tensor)


def check_alike(keyed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a file has two values for what is one tensor here."""
    seen: dict[int, str] = {}
    for key, own in keyed.items():
        first = seen.setdefault(id(own), key)
        if first != key and {first, key} <= tensors.keys() and not torch.equal(tensors[first], tensors[key]):
            raise CheckpointError(
                f"{first!r} and {key!r} are one tensor here and differ in the adapter file: it was made with another "
                "stride_A, or other places share there (see sharing=)"
            )
