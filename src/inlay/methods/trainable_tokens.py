"""Trainable tokens: chosen rows of the token embedding are trained, the others stay (HF peft's method of that name).

    E'[i] = v_i   for the chosen ids i,        E'[i] = E[i]   for all others

v starts as the rows themselves. Where the output head is tied to the embedding, its logits for the chosen ids follow:
z_i = v_i · h. No second table is formed: the embedding swaps the rows looked up, the head adds (v_i − E_i) · h.

Parameters: ids · width, once for tied places.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from inlay.engine.adapters import Adapter, find_adapters
from inlay.engine.peft_names import shortest_names, targets_from_peft
from inlay.engine.piece import Method, Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.trained_copy import ModulesToSave
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.subsets.token_rows import TokenRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """E'[i] = v_i for chosen token ids: train some rows of the embedding, and of the head tied to it."""

    kind = "trainable_tokens"
    hosts = frozenset({"embedding"})
    default_targets = "embed"
    peft_type = "TRAINABLE_TOKENS"
    paper = "HF peft, TrainableTokens"

    token_indices: Sequence[int] = ()
    """Ids of the tokens whose rows are trained (a tokenizer turns strings into ids: `convert_tokens_to_ids`)."""

    def __post_init__(self) -> None:
        ids = list(self.token_indices)
        if not ids or not all(isinstance(i, int) and i >= 0 for i in ids) or len(set(ids)) != len(ids):
            raise ConfigError(
                f"TrainableTokens(token_indices={self.token_indices!r}): give the ids of the tokens to train, each once"
            )

    def sites(self, index: SiteIndex) -> list[Site]:
        """The chosen embeddings; of several that are tied, the first stands for all."""
        found: dict[int, Site] = {}
        for site in super().sites(index):
            found.setdefault(id(site.weight), site)
        return list(found.values())

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        made: list[tuple[Site, Piece]] = []
        everywhere = [site for site in SiteIndex(model).sites if site.kind in ("embedding", "linear")]
        for site in sites:
            rows = TokenRows(self, site)
            made.append((site, rows))
            tied = (s for s in everywhere if s.path != site.path and s.module._parameters.get("weight") is site.weight)
            made += [(other, TokenRows(self, other, rows)) for other in tied]
        return made

    def on_attach(self, model: nn.Module, pieces: Sequence[tuple[Site, Piece]]) -> None:
        adapter = _adapter_with(model, [site for site, _ in pieces])
        for _, piece in pieces:
            assert isinstance(piece, TokenRows)
            piece.rides = adapter is not None and self.rides_with(adapter.methods)

    def rides_with(self, methods: Sequence[Method]) -> bool:
        return any(method.peft_type == "LORA" for method in methods)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        embeddings = self.sites(index)
        adapter = _adapter_with(index.model, sites)
        if adapter is None or not self.rides_with(adapter.methods):
            if adapter is not None and any(isinstance(method, ModulesToSave) for method in adapter.methods):
                raise UnsupportedError("HF peft's TrainableTokensConfig has no modules_to_save")
            # A pattern of whole paths, because peft warns of tied layers when a list ends in their usual names.
            paths = "|".join(re.escape(site.path) for site in embeddings)
            return {"target_modules": paths, "token_indices": list(self.token_indices)}
        rows: dict[str, list[int]] = {}
        for method in adapter.methods:  # one field of the file's config describes all of them
            if isinstance(method, TrainableTokens):
                names = shortest_names([site.path for site in method.sites(index)], [site.path for site in index.sites])
                rows |= {name: list(method.token_indices) for name in names}
        return {"trainable_token_indices": rows}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        targets = targets_from_peft(config) if config.get("target_modules") else {}
        return [cls(**targets, token_indices=tuple(config["token_indices"]))]

    @classmethod
    def from_lora(cls, config: Mapping[str, Any]) -> list[Method]:
        """What `trainable_token_indices` of a peft LoraConfig describes: ids, or ids for each embedding by name."""
        indices = config.get("trainable_token_indices") or {}
        if isinstance(indices, Mapping):
            return [cls(targets=(f"name:{name}",), token_indices=tuple(ids)) for name, ids in indices.items()]
        return [cls(token_indices=tuple(indices))]


def _adapter_with(model: nn.Module, sites: Sequence[Site]) -> Adapter | None:
    """The loaded adapter that put pieces at these very sites."""
    adapters = find_adapters(model)
    wanted = {id(site) for site in sites}
    loaded = adapters.loaded.values() if adapters is not None else ()
    return next((a for a in loaded if any(id(site) in wanted for site, _ in a.pieces())), None)
