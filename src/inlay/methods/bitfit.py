"""BitFit: bias-term fine-tuning (Ben Zaken et al. 2021, arXiv:2106.10199).

    y = W x + b'        b' starts as the base's own b

Every bias is trained, those of LayerNorms included, or those of chosen places ("query,up" is the paper's small set). A
model without biases can be given some: `add_missing=True` adds a vector that starts at zero to the output of linears
and convolutions that have none.

Parameters: the sum of the sizes of the chosen biases. BERT-base with its pooler: 102,912; "query,up" there: 46,080.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.engine.parameters import is_bias, parameter_sites
from inlay.engine.piece import Piece, trainable_dtype
from inlay.engine.roles import new_heads
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.targets import split_items
from inlay.engine.trained_copy import CopyMethod, copies
from inlay.errors import UnsupportedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(CopyMethod):
    """y = W x + b': only biases are trained, all of them or those that `targets` names."""

    kind = "bitfit"
    default_targets = "re:.*"
    paper = "Ben Zaken et al. 2021, arXiv:2106.10199"
    learning_rate: ClassVar[float] = 1e-3

    add_missing: bool = False
    """Give chosen linears and convolutions that have no bias one that starts at zero (heads only if named)."""

    def sites(self, index: SiteIndex) -> list[Site]:
        found: dict[str, Site] = {}
        items = [self.targets] if self.targets is None or callable(self.targets) else split_items(self.targets)
        for item in items:
            chosen = self._chosen(index, item)
            if not chosen:
                raise UnsupportedError(
                    f"BitFit: {'no place' if item is None else f'nothing that {item!r} names'} in "
                    f"{type(index.model).__name__} has a bias; add_missing=True adds biases that start at zero"
                )
            found |= {site.name: site for site in chosen}
        return list(found.values())

    def _chosen(self, index: SiteIndex, item: Any) -> list[Site]:
        """The biases that one target names, and the places that are to be given one."""
        named = parameter_sites(index, item, exclude=self.exclude, layers=self.layers, what="BitFit")
        if item is None:  # new heads are trained whole, by `attach`
            heads = tuple(f"{head}." for head in new_heads(index.model))
            named = [site for site in named if not site.name.startswith(heads)]
        chosen = [site for site in named if is_bias(site)]
        if not self.add_missing:
            return chosen
        paths = {site.path for site in named if item is not None or "head" not in site.roles}
        return chosen + [
            site for site in index.sites if site.path in paths and site.kind in ("linear", "conv") and site.bias is None
        ]

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        added: list[tuple[Site, Piece]] = [(site, AddedBias(site)) for site in sites if site.kind != "parameter"]
        return copies(site for site in sites if site.kind == "parameter") + added

    def file_key(self, site: Site, name: str) -> str:
        return f"base_model.model.{site.name}{'.' if name else ''}{name}"


class AddedBias(Piece):
    """y + b where the host has no bias; b (out) starts at zero."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.axes = site.weight.dim() - 2 if site.kind == "conv" else 0
        self.added = nn.Parameter(torch.zeros(site.out_features, dtype=trainable_dtype(site.dtype), device=site.device))

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        y = inner(*args, **kwargs)
        return y + self.added.view(-1, *[1] * self.axes).to(y.dtype)

    def weight(self, weight: Tensor) -> Tensor:
        return weight

    def bias(self, bias: Tensor | None) -> Tensor | None:
        return self.added if bias is None else bias + self.added

    def file_tensors(self) -> dict[str, Tensor]:
        return {"bias": self.added}
