"""Prefix tuning: trained keys and values that every token attends to, in every layer.

Li, Liang (2021), "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190; as deep prompts for
understanding: Liu et al. (2022), "P-Tuning v2", arXiv:2110.07602.

    attention(q) = softmax(q [K_p ; K]ᵀ / √d) [V_p ; V]          K_p, V_p: n rows per layer
    reparametrised:  [K_p ; V_p] = W_l tanh(W_0 E + b_0) + b_l    E: n rows, shared by the layers
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from inlay.engine.piece import Method, Piece
from inlay.engine.prompts import attention_sites as places
from inlay.engine.prompts.attention import PositionShift, PrefixAttention
from inlay.engine.prompts.entry import arguments_of, encoder_of
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.prompts import files
from inlay.pieces.prompts.attending import AttendingMethod
from inlay.pieces.prompts.prefix_source import prefix_sources
from inlay.pieces.prompts.transfer import Transfer

if TYPE_CHECKING:
    from inlay.engine.sites import Site, SiteIndex


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(Transfer, AttendingMethod):
    """n trained keys and values in each self-attention. Parameters: n · Σ over layers of (d_k + d_v) · key-value heads;
    reparametrised (d: hidden size, m: projection_size): n·d + m(d + 1) + (m + 1) · Σ (d_k + d_v) · key-value heads.

    Works with `generate`, any cache, padding, grouped queries and both gradient checkpointings, on attentions that go
    through transformers' attention interface ("eager" or "sdpa"). Prefix columns are always visible, in sliding windows
    too, and lie first in `attentions`. It is HF peft's PREFIX_TUNING; of peft's prefixes for encoder–decoders, whose
    layers share slots, files are read but not written.
    """

    kind = "prefix_tuning"
    hosts = frozenset({"module"})
    default_targets = "self_attention"
    peft_type = "PREFIX_TUNING"
    paper = "Li, Liang 2021, arXiv:2101.00190"

    num_virtual_tokens: int = 20
    """n, the rows of the prefix in each layer."""
    stacks: Literal["decoder", "encoder", "both"] = "decoder"
    """Of an encoder–decoder: which half has prefixes. No meaning for other models."""
    projection_size: int | None = None
    """m, the width of the MLP that the prefix is computed by; None: the prefix itself is trained."""
    init: Literal["random", "zeros", "text"] = "random"
    """How the prefix starts: "random" (normal), "zeros", or "text": the keys and values of `text` (decoders only), so
    that the model starts as if it had read it."""
    text: str | None = None
    """For init="text"; repeated or cut to n tokens."""
    tokenizer: str | None = None
    """For init="text": name or folder of the tokenizer; None takes the model's own."""
    shift_positions: bool = True
    """Whether the text's positions begin after the prefix, as if it stood before the text (HF peft does so)."""

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "projection_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"PrefixTuning({name}={value}): it must be 1 or more")
        choices = {"stacks": ("decoder", "encoder", "both"), "init": ("random", "zeros", "text")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"PrefixTuning({name}={getattr(self, name)!r}): choose one of {', '.join(allowed)}")
        if self.init == "text" and (not self.text or self.projection_size is not None):
            raise ConfigError("PrefixTuning(init='text') needs text=, and no projection_size, which cannot be inverted")
        if self.init_from is not None and (self.init != "random" or self.projection_size is not None):
            raise ConfigError(
                "PrefixTuning(init_from=…) has no other init, and no projection_size, which has no inverse"
            )
        self.check_transfer()
        if self.overrides:
            raise ConfigError("PrefixTuning has no overrides: all layers are stored as one tensor of n rows")

    # -- where ---------------------------------------------------------------------------------------------------------

    def sites(self, index: SiteIndex) -> list[Site]:
        """The self-attentions. Raises UnsupportedError where the attention is not open to a prefix."""
        sites = super().sites(index)
        source = encoder_of(index.model)
        if source is not None and self.stacks != "both":
            inside = {id(module) for module in source.modules()}
            sites = [site for site in sites if (id(site.module) in inside) == (self.stacks == "encoder")]
        if not sites:
            raise ConfigError(f"PrefixTuning(targets={self.targets!r}, stacks={self.stacks!r}) leaves no attention")
        places.check_interface(index.model, sites, type(self).__name__)
        return sites

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        """The prefixes, and what shifts the text's positions."""
        from inlay.engine.sites import SiteIndex

        index = SiteIndex(model)
        shapes = [places.key_value_shape(site, index) for site in sites]
        rows = [heads * (keys + values) for heads, keys, values in shapes]
        sources = prefix_sources(self, model, sites, rows)
        pieces: list[tuple[Site, Piece]] = []
        for site, shape, source in zip(sites, shapes, sources, strict=True):
            bias = places.bias_source(site, model)
            pieces.append((site, PrefixAttention(source, self.num_virtual_tokens, shape, site.module, bias)))
        by_path = {site.path: site for site in index.sites if site.parameter is None}
        if self.shift_positions:
            for path, module, positions, start in places.position_modules(model, sites):
                shift = PositionShift(self.num_virtual_tokens, arguments_of(module), positions, start)
                pieces.append((by_path[path], shift))
        return pieces + self.recorder(model, by_path[""])

    def for_file(self) -> Method:
        """The method as a file describes it: how the prefix started no longer matters."""
        return self.replace(init="random", text=None, tokenizer=None, init_from=None, init_weights=None)

    # -- files ---------------------------------------------------------------------------------------------------------

    def export(self, pieces: Sequence[tuple[Site, Piece]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`prompt_embeddings`: (n, all layers' keys and values); in the second file, what projects them."""
        return files.prefix_tensors(files.prefixes(pieces), self.projection_size is not None)

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        """Take the prefix, or what projects it, from the files."""
        files.take_prefix(files.prefixes(pieces), self.projection_size is not None, tensors, extra)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        """peft's PrefixTuningConfig; UnsupportedError for what it has no fields for."""
        sites = [site for site in sites if places.uses_interface(site.module)]
        shapes = {places.key_value_shape(site, index) for site in sites}
        complete = dataclasses.replace(self, targets=None, exclude=None, layers=None).sites(index)
        heads, keys, values = shapes.pop()
        if (
            shapes
            or keys != values
            or [s.path for s in complete] != [s.path for s in sites]
            or not self.shift_positions
        ):
            raise UnsupportedError("HF peft has prefixes of one shape, in all layers, with shifted positions, only")
        if encoder_of(index.model) is not None:
            raise UnsupportedError("HF peft gives several decoder layers of an encoder–decoder one and the same prefix")
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": heads * keys,
            "num_transformer_submodules": 1,
            "num_attention_heads": heads,
            "num_layers": len(sites),
            "prefix_projection": False,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        """The prefix itself; a projection behind it is not in the file."""
        if config.get("prefix_projection"):
            warnings.warn(
                "HF peft saves no projection: the prefix is loaded as it is, and trained so from now on", stacklevel=2
            )
        method = PeftHalves if config.get("num_transformer_submodules") == 2 else cls
        return [method(num_virtual_tokens=config["num_virtual_tokens"])]


class PeftHalves(PrefixTuning):
    """A peft file for an encoder–decoder, whose decoder layer l has slot 2l mod L: peft splits two copies by fours."""

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        """Take the slots in peft's order."""
        files.from_slots(tensors, len(files.prefixes(pieces)))
        super().import_(pieces, tensors, extra)
