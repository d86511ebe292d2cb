"""A restricted head: of a language model's output matrix only the rows of the verbalizer's words, trained and small.

    z_j = v_j · h + c_j        for the chosen tokens j;  V (tokens, d) and c start as the head's own rows

The model's logits have one column for each chosen token, in their order, and no other is computed. So an adapter with
its head is a few megabytes, whatever the vocabulary.

Wiegmann et al. 2023, arXiv:2312.16975, whose head starts at random; here it starts as the language model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from inlay.engine.host import inlays_of
from inlay.engine.piece import Method, Piece, trainable_dtype
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError, UnsupportedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestrictedHead(Method):
    """Trained rows of the output matrix, in place of all of it. Parameters: tokens · (d + 1), without a bias · d."""

    kind = "restricted_head"
    hosts = frozenset({"linear"})
    paper = "Wiegmann et al. 2023, arXiv:2312.16975"

    token_ids: Sequence[int]
    """The tokens whose logits are computed, each once."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
        if not self.token_ids or len(set(self.token_ids)) < len(self.token_ids) or min(self.token_ids) < 0:
            raise ConfigError(f"RestrictedHead(token_ids={self.token_ids!r}): give the ids of tokens, each once")
        if self.targets is not None or self.exclude is not None or self.layers is not None or self.overrides:
            raise ConfigError("RestrictedHead sits at the output: it has no targets, exclude, layers or overrides")

    @override
    def sites(self, index: SiteIndex) -> list[Site]:
        """The output embedding. Raises UnsupportedError where the model has none that is a linear."""
        head = output_of(index.model)
        if not isinstance(head, nn.Linear):
            raise UnsupportedError(f"{type(index.model).__name__} has no output matrix whose rows could be chosen")
        return [next(site for site in index.sites if site.module is head and site.parameter is None)]

    @override
    def piece(self, site: Site) -> Piece:
        return RowsPiece(self.token_ids, site)


class RowsPiece(Piece):
    """V h + c; the base's own matrix is not multiplied."""

    def __init__(self, token_ids: Sequence[int], site: Site) -> None:
        super().__init__()
        self.token_ids = tuple(token_ids)
        head: Any = site.module
        if max(self.token_ids) >= len(head.weight):
            raise ConfigError(
                f"RestrictedHead: there is no token {max(self.token_ids)}; the head has {len(head.weight)}"
            )
        dtype, rows = trainable_dtype(head.weight.dtype), list(self.token_ids)
        self.value = nn.Parameter(head.weight.detach()[rows].to(dtype, copy=True))
        self.offset = None if head.bias is None else nn.Parameter(head.bias.detach()[rows].to(dtype, copy=True))

    @override
    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.linear(x, self.value.to(x.dtype), None if self.offset is None else self.offset.to(x.dtype))


def output_of(model: Any) -> nn.Module | None:
    """The model's output embedding."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def restricted_to(model: Any) -> tuple[int, ...] | None:
    """The tokens whose logits a model with an active restricted head computes; None: it computes all."""
    head = output_of(model)
    inlays = None if head is None else inlays_of(head)
    piece = None if inlays is None else inlays.call().piece
    return piece.token_ids if isinstance(piece, RowsPiece) else None
