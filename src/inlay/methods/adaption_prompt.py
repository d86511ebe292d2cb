"""Adaption prompts (LLaMA-Adapter): prompts inside the upper layers' attentions, each behind a gate that starts at 0.

Zhang et al. (2023), "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
arXiv:2303.16199.

    attention(q) = softmax(q Kᵀ / √d) V + g · softmax(q K_pᵀ / √d) V_p      K_p = W_k P, V_p = W_v P; g starts at 0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from inlay.engine.piece import Method, Piece
from inlay.engine.prompts.attention_sites import check_interface
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.prompts.adaption import AdaptionAttention, projections
from inlay.pieces.prompts.attending import AttendingMethod
from inlay.pieces.prompts.checks import check_counts

if TYPE_CHECKING:
    from inlay.engine.sites import Site, SiteIndex

PEFT = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}
"""The models that HF peft has it for, and what it calls their attentions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptionPrompt(AttendingMethod):
    """A prompt of n vectors and a gate in each of the top attentions (d: hidden size, L: layers).

    Parameters: L · (n · d + 1). The prompt has no positions and takes none of the text's; it works with `generate`, any
    cache, grouped queries and both gradient checkpointings. It is HF peft's ADAPTION_PROMPT, for more models.
    """

    kind = "adaption_prompt"
    hosts = frozenset({"module"})
    default_targets = "self_attention"
    peft_type = "ADAPTION_PROMPT"
    paper = "Zhang et al. 2023, arXiv:2303.16199"

    num_virtual_tokens: int = 10
    """n, the vectors of each layer's prompt."""
    num_layers: int | None = None
    """How many of the attentions, counted from the top; None: all. The paper takes 30 of 32."""
    projected: bool = True
    """Whether what is added goes through the attention's output projection, as in the paper; peft's GPT-2 does not."""

    def __post_init__(self) -> None:
        check_counts(self, "num_virtual_tokens", optional="num_layers")
        if self.overrides:
            raise ConfigError("AdaptionPrompt has no overrides: attach two of them, each with its layers")

    def sites(self, index: SiteIndex) -> list[Site]:
        """The top self-attentions. Raises UnsupportedError where the attention is not open to a prompt."""
        sites = super().sites(index)
        if self.num_layers is not None and self.num_layers > len(sites):
            raise ConfigError(f"AdaptionPrompt(num_layers={self.num_layers}): there are {len(sites)} attentions")
        sites = sites[-self.num_layers :] if self.num_layers is not None else sites
        check_interface(index.model, sites, "AdaptionPrompt")
        for site in sites:
            projections(site, index)
        return sites

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        """A prompt and a gate for each attention."""
        from inlay.engine.sites import SiteIndex

        index = SiteIndex(model)
        return [(site, AdaptionAttention(site, index, self.num_virtual_tokens, self.projected)) for site in sites]

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        """peft's AdaptionPromptConfig; UnsupportedError for what it has no fields for."""
        kind = getattr(getattr(index.model, "config", None), "model_type", None)
        top = dataclasses.replace(self, targets=None, exclude=None, layers=None, num_layers=len(sites)).sites(index)
        if kind not in PEFT or [site.path for site in top] != [site.path for site in sites]:
            raise UnsupportedError(f"HF peft has adaption prompts in the top layers of {', '.join(PEFT)} only")
        if self.projected == (kind == "gpt2"):
            raise UnsupportedError("HF peft projects what it adds in Llama and Mistral, and not in GPT-2")
        if getattr(index.model.config, "attention_bias", False):
            raise UnsupportedError("HF peft adds the output projection's bias a second time")
        return {"adapter_len": self.num_virtual_tokens, "adapter_layers": len(sites), "target_modules": PEFT[kind]}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        """The prompts of the top layers."""
        projected = config["target_modules"] != PEFT["gpt2"]
        n, layers = config["adapter_len"], config["adapter_layers"]
        return [cls(num_virtual_tokens=n, num_layers=layers, projected=projected)]
