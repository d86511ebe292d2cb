"""BD-LoRA: a LoRA with block-diagonal factors (Wang et al. 2025, arXiv:2510.23346).

    ΔW = s · B A,     s = alpha / r,     A = diag(A₁ … A_n) where W is cut by its inputs in tensor-parallel serving,
                                         B = diag(B₁ … B_n) where it is cut by its outputs

Each of n devices then holds its block and needs no other's. A's blocks start √n times as large as LoRA's A, so that
A x starts as large; B starts at zero, so the model starts as the base. With n = 1 it is LoRA.

Parameters: r · (in / n + out) where A has the blocks, r · (in + out / n) where B has them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.targets import split_items
from inlay.errors import ConfigError, UnsupportedError
from inlay.methods.lora import LoRA
from inlay.pieces.lora.blocks import BlockLoRAPiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class BDLoRA(LoRA):
    """ΔW = s · B A with one of the two block-diagonal: an adapter that tensor-parallel serving cuts for nothing."""

    kind = "bdlora"
    hosts = frozenset({"linear"})
    peft_variant = "use_bdlora"
    paper = "Wang et al. 2025, arXiv:2510.23346"

    nblocks: int = 2
    """Blocks n of the block-diagonal factor: the devices that will serve it."""
    blocks_in_a: Sequence[str] = ("role:output", "role:down")
    """Places whose A has the blocks: roles, names or "re:…" patterns."""
    blocks_in_b: Sequence[str] = ("role:query", "role:key", "role:value", "role:up", "role:gate", "role:gate_up")
    """Places whose B has them."""
    match_strict: bool = True
    """Refuse places that are in neither; otherwise they have a plain LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("blocks_in_a", "blocks_in_b"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, tuple(split_items(getattr(self, name))))
        if type(self.nblocks) is not int or self.nblocks < 1 or self.r % self.nblocks:
            raise ConfigError(f"BDLoRA(r={self.r}, nblocks={self.nblocks!r}): a divisor of the rank is needed")
        if self.init not in ("kaiming", "gaussian", "random") or self.lora_bias:
            field = "lora_bias=True" if self.lora_bias else f"init={self.init!r}"
            raise ConfigError(f"BDLoRA({field}): blocks have none; leave it out, or use LoRA")

    def blocks(self, site: Site) -> str:
        """Which factor has the blocks at a place: "a", "b", or "" for neither."""
        found = [f for f in "ab" if any(site.matches(item) for item in getattr(self, f"blocks_in_{f}"))]
        if len(found) == 2 or (self.match_strict and not found):
            what = "both blocks_in_a and blocks_in_b" if found else "neither blocks_in_a nor blocks_in_b"
            raise ConfigError(f"BDLoRA cannot sit at {site.name}: it is in {what}; name it in one, or exclude it")
        return "".join(found)

    def piece(self, site: Site) -> Piece:
        return BlockLoRAPiece(self, site, self.blocks(site))

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        sites = [site for site in sites if site.parameter != "bias"]
        if any(site.transposed for site in sites):
            raise UnsupportedError("HF peft has no BD-LoRA on transformers' Conv1D")
        groups: dict[str, set[str]] = {"a": set(), "b": set(), "": set()}
        for site in sites:
            groups[self.blocks(site)].add(site.tail)
        for factor in "ab":  # peft looks for its names anywhere in the last part of a path
            others = set().union(*(names for other, names in groups.items() if other != factor))
            if any(name in other for name in groups[factor] for other in others):
                raise UnsupportedError("HF peft cannot tell the places of A's blocks from those of B's by their names")
        entry: dict[str, Any] = {f"target_modules_bd_{factor}": sorted(groups[factor]) for factor in "ab"}
        shared = {"nblocks": self.nblocks, "match_strict": self.match_strict}
        return super().to_peft(sites, index) | {self.peft_variant: entry | shared}

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        entry = config[cls.peft_variant]
        fields: dict[str, Any] = {
            "nblocks": entry.get("nblocks", 1), "match_strict": entry.get("match_strict", True)
        }  # fmt: skip
        for factor in "ab":
            names = entry.get(f"target_modules_bd_{factor}") or []
            fields[f"blocks_in_{factor}"] = tuple(rf"re:(?:.*\.)?[^.]*{re.escape(name)}[^.]*" for name in names)
        return super().fields_from_peft(config) | fields
