"""Where a reversible stack's pieces sit: at blocks, at the module that calls them, and at the blocks' two halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.structure import ancestors, parent
from inlay.engine.sub_layers import SubLayers
from inlay.errors import ConfigError, TargetError
from inlay.pieces.bottlenecks.bottleneck import AfterPiece, BesidePiece, paired
from inlay.pieces.reversible.stack import Between, ReversibleBlock, ReversibleStack, Scope, Silence

Placed = list[tuple[Site, Piece]]
Network = Callable[[int, int, Site], Any]
"""A fresh bottleneck: features in, features out, and a place that says on which device and in which dtype."""


def block_sites(index: SiteIndex, targets: Any, exclude: Any, layers: Any, what: str) -> list[Site]:
    """The blocks that are, or lie in, what is targeted. TargetError where none is, ConfigError for gaps between."""
    blocks = [site for site in index.sites if "block" in site.roles and site.layer is not None]
    if targets is not None:
        hosts = frozenset({"module", "attention"})
        chosen = {site.path for site in index.select(targets, hosts=hosts, what=what)}
        blocks = [site for site in blocks if not chosen.isdisjoint(ancestors(site.path))]
    if not blocks:
        found = f"in targets {targets!r}" if targets is not None else "no repeated blocks"
        raise TargetError(f"{what}: no place for a reversible stack in {type(index.model).__name__} ({found})")
    paths = {site.path for site in blocks}
    blocks = index.select(
        lambda site: site.path in paths and site.parameter is None,
        hosts=frozenset({"module"}), exclude=exclude, layers=layers, what=what,
    )  # fmt: skip
    for stack in stacks(blocks):
        numbers = [site.layer for site in stack]
        first = numbers[0] or 0
        if numbers != list(range(first, first + len(numbers))):
            raise ConfigError(f"{what}: the blocks of a stack must follow upon each other, and {numbers} do not")
    return blocks


def stacks(blocks: Sequence[Site]) -> list[list[Site]]:
    """The blocks of each container, in order."""
    found: dict[str, list[Site]] = {}
    for site in blocks:
        found.setdefault(parent(site.path), []).append(site)
    return list(found.values())


class Halves:
    """The sub-layers of a model's blocks, for stacks set into them."""

    def __init__(self, index: SiteIndex, network: Network, what: str) -> None:
        self.index, self.network, self.what = index, network, what
        self.layers = SubLayers(index, what)
        self.forwards = self.layers.feed_forwards()
        self.outputs = [site for site in index.sites if "output" in site.roles and site.kind in ("linear", "parameter")]

    def placed(self, stack: ReversibleStack, blocks: Sequence[Site]) -> Placed:
        """Every piece of one stack; those of a block inside it before its own."""
        holder = self.layers.named[parent(parent(blocks[0].path))]
        made: Placed = [(holder, Scope(stack, [site.module for site in blocks]))]
        for index, block in enumerate(blocks):
            forwards = self._inside(block, self.forwards)
            if not forwards:
                raise TargetError(f"{self.what}: no feed-forward network was recognised in {block.path}")
            for site in forwards:
                made += self.beside(site)
            network, norm = None, None
            if stack.variant == 3:
                norm = self.norm_between(block)
                made += self.halves(stack, block, forwards, norm)
            else:
                width = self.layers.widths(forwards[-1])[1]
                network = self.network(width, width, forwards[-1])
            made.append((block, ReversibleBlock(stack, index, network, norm is not None)))
        return made

    def _inside(self, block: Site, sites: Sequence[Site]) -> list[Site]:
        return [site for site in sites if block.path in ancestors(site.path)]

    def beside(self, site: Site) -> Placed:
        """An adapter beside a feed-forward network."""
        pair = self.layers.pair(site)
        if pair is not None:
            return paired(self.network(pair.first.in_features, site.out_features, site), *pair, site)
        return [(site, BesidePiece(self.network(*self.layers.widths(site), site)))]

    def norm_between(self, block: Site) -> Site | None:
        """The norm that ends a block's attention half; None where the halves end in a residual addition."""
        norms = [site for site in self._inside(block, self.index.sites) if "post_norm" in site.roles]
        attention = [site for site in norms if "ffn_norm" not in site.roles and site.kind == "norm"]
        return attention[-1] if attention else None

    def halves(self, stack: ReversibleStack, block: Site, forwards: Sequence[Site], norm: Site | None) -> Placed:
        """The adapters after a block's attentions, and the pieces that silence one half."""
        made: Placed = []
        for site in self._inside(block, self.layers.attention_outputs()):
            width = site.out_features
            made.append((site, AfterPiece(self.network(width, width, site))))
        for site in self.attentions(block, norm):
            made.append((site, Silence(stack, "feed", None)))
        for site in forwards:
            if site.kind == "linear":
                ups = [s for s in self._inside(block, self.index.sites) if s.kind == "linear" and "up" in s.roles]
                made += [(up, Silence(stack, "attend", up.out_features)) for up in ups]
                made.append((site, Silence(stack, "attend", site.out_features)))
            else:
                made.append((site, Silence(stack, "attend", None)))
        return [*made, (norm, Between(stack))] if norm is not None else made

    def attentions(self, block: Site, norm: Site | None) -> list[Site]:
        """The attentions of a block, each with its output projection where a zero would otherwise gain a bias."""
        found: list[Site] = []
        for site in self._inside(block, self.index.sites):
            if site.kind in ("module", "attention") and {"self_attention", "cross_attention"} & site.roles:
                above = self.layers.named.get(parent(site.path), site)
                whole = site.kind == "attention" or any(site.path in ancestors(o.path) for o in self.outputs)
                holds = not whole and above.path != block.path and any(
                    above.path in ancestors(o.path) for o in self.outputs
                )  # fmt: skip
                reaches = norm is not None and above.path in ancestors(norm.path)
                found.append(above if holds and not reaches else site)
        if not found:
            raise TargetError(
                f"{self.what}(variant=3): no attention was recognised in {block.path}: needs a variant 1 or 2"
            )
        return found


def activation_of(model: nn.Module, known: Sequence[str]) -> str:
    """The activation function that a model's config names, if it is a known one; else gelu."""
    config: Any = getattr(model, "config", None)
    names = (
        getattr(config, field, None) for field in ("hidden_act", "activation_function", "activation", "dense_act_fn")
    )
    return next((name for name in names if isinstance(name, str) and name in known), "gelu")
