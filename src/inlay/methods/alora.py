"""aLoRA: activated LoRA, from its invocation on (Greenewald et al. 2025, arXiv:2504.12397).

    y_t = W x_t                       before the invocation tokens, and in texts without them
    y_t = W x_t + s · B (A x_t)       from the first of them (of their last occurrence) on,      s = alpha / r

Before the invocation the model is the base, so the keys and values that the base has cached of a long text serve every
such adapter. B starts at zero, so the model starts as the base.

Parameters: r · (in + out) for each linear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.prompts.entry import encoder_of, prompt_sites
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError, UnsupportedError
from inlay.methods.lora import LoRA
from inlay.pieces.lora.invocation import Invocation, InvocationEntry, InvokedLoRAPiece


@dataclasses.dataclass(frozen=True, kw_only=True)
class ALoRA(LoRA):
    """y = W x + s · B (A x) from the invocation tokens on, and the base before them."""

    kind = "alora"
    hosts = frozenset({"linear"})
    peft_variant = "alora_invocation_tokens"
    paper = "Greenewald et al. 2025, arXiv:2504.12397"

    invocation_tokens: Sequence[int] = ()
    """Ids of the tokens that invoke the adapter, as they stand in the text."""

    def piece(self, site: Site) -> Piece:
        return InvokedLoRAPiece(self, site)

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        tokens = list(self.invocation_tokens)
        if not tokens or not all(isinstance(token, int) and token >= 0 for token in tokens):
            raise ConfigError(f"ALoRA(invocation_tokens={self.invocation_tokens!r}): give the ids of the tokens")
        if encoder_of(model) is not None:
            raise UnsupportedError(f"ALoRA cannot sit in {type(model).__name__}, which reads two texts: use LoRA there")
        entry, invocation = prompt_sites(SiteIndex(model), type(self).__name__)[0], Invocation()
        made = super().build(model, sites)
        for _, piece in made:
            if isinstance(piece, InvokedLoRAPiece):
                piece.invocation = invocation
        return [(entry, InvocationEntry(invocation, tokens, model)), *made]

    def _keyed(self, pieces: Sequence[tuple[Site, Piece]]) -> Iterator[tuple[Piece, dict[str, tuple[str, Tensor]]]]:
        return super()._keyed([(site, piece) for site, piece in pieces if not isinstance(piece, InvocationEntry)])

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        placed = [site for site in sites if site.kind == "linear"]
        return super().to_peft(placed, index) | {self.peft_variant: list(self.invocation_tokens)}

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().fields_from_peft(config) | {"invocation_tokens": tuple(cast("Any", config[cls.peft_variant]))}
