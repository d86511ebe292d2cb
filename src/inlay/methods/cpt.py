"""Context-aware prompt tuning: examples stand before the text, and their vectors may move, each within a small ball.

Blau et al. (2024), "Context-Aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods",
arXiv:2410.17222.

    E' = [E(c) + δ ; E(x)],   ‖δ_i‖ ≤ ε_i        c: the examples' tokens
    loss = mean of w · cross entropy over the labels of the text (w = 1) and of the examples (w = decay, decay², …)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.engine.checkpoint import task_type
from inlay.engine.piece import Method, Piece, trainable_dtype
from inlay.engine.prompts.entry import peft_fields, prompt_of, prompt_pieces, prompt_sites, take_prompt
from inlay.engine.prompts.virtual_tokens import PromptEntry
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.prompts.checks import check_entry
from inlay.pieces.prompts.context import ContextEntry, ContextPrompt, Projection
from inlay.pieces.prompts.files import take_all

if TYPE_CHECKING:
    from inlay.engine.controller import Controller
    from inlay.engine.sites import Site, SiteIndex


@dataclasses.dataclass(frozen=True, kw_only=True)
class CPT(Method):
    """Examples whose embeddings are trained within balls (n: their tokens). Parameters: n·d.

    It starts as the base that reads the examples before the text. Trained with a causal language model's labels. It is
    HF peft's CPT; the examples' own vectors, and how far they moved, are kept in the second file: training goes on.
    """

    kind = "cpt"
    hosts = frozenset({"module", "embedding"})
    peft_type = "CPT"
    paper = "Blau et al. 2024, arXiv:2410.17222"

    token_ids: tuple[int, ...] = ()
    """c, the tokens of the examples."""
    token_types: tuple[int, ...] | None = None
    """What each is: 1 template around an input, 2 input, 3 template around a label, 4 label; 5 to 8 the same of
    the next example, and so on; 0 none. None: all 1."""
    epsilon: float = 0.1
    """ε of inputs, at a width of 2048; it scales with the width's square root."""
    format_epsilon: float = 0.1
    """ε of templates."""
    loss_decay: float = 1.0
    """What the labels of an example count, relative to those of the next."""

    def __post_init__(self) -> None:
        for name in ("token_ids", "token_types"):  # from YAML as lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.token_ids:
            raise ConfigError("CPT(token_ids=()): give the tokens of at least one example, as a tokenizer makes them")
        if self.token_types is not None and (len(self.token_types) != len(self.token_ids) or min(self.token_types) < 0):
            raise ConfigError(f"CPT: {len(self.token_ids)} token_ids need as many token_types, each 0 or more")
        for name in ("epsilon", "format_epsilon", "loss_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"CPT({name}={getattr(self, name)}): it must be 0 or more")
        check_entry(self)

    @property
    def types(self) -> tuple[int, ...]:
        """The type of each token."""
        return self.token_types or (1,) * len(self.token_ids)

    def sites(self, index: SiteIndex) -> list[Site]:
        """The model, and the token embedding that reads the text. Raises UnsupportedError for an encoder–decoder."""
        sites = prompt_sites(index, "CPT")
        table = sites[-1].module
        if len([site for site in sites if not isinstance(site.module, nn.Embedding)]) > 1:
            raise UnsupportedError("CPT needs a model that reads examples and text as one; an encoder–decoder does not")
        assert isinstance(table, nn.Embedding)
        if not 0 <= min(self.token_ids) <= max(self.token_ids) < table.num_embeddings:
            raise ConfigError(
                f"CPT(token_ids={self.token_ids}): the model has the tokens 0 to {table.num_embeddings - 1}"
            )
        return sites

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        """The examples' vectors, and the pieces that put them in."""
        ids = torch.tensor([self.token_ids], device=sites[-1].device)
        with torch.no_grad():
            center = sites[-1].module(ids)[0].detach().clone().to(trainable_dtype(sites[-1].dtype))
        prompt = ContextPrompt(center, self.types, self.epsilon, self.format_epsilon)
        pieces = prompt_pieces(sites, prompt, len(self.token_ids), entry=ContextEntry)
        for _, piece in pieces:
            if isinstance(piece, ContextEntry):
                piece.tokens, piece.types, piece.decay = self.token_ids, self.types, self.loss_decay
        return pieces

    def controller(self, pieces: Mapping[str, Piece]) -> Controller | None:
        """What draws the vectors back into their balls."""
        entry = next(piece for piece in pieces.values() if isinstance(piece, PromptEntry))
        return Projection(entry.shared[0])  # type: ignore[arg-type]

    def export(self, pieces: Sequence[tuple[Site, Piece]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`prompt_embeddings` (n, d), where the vectors are; beside it, where they started and how far they moved."""
        prompt = prompt_of(pieces)
        with torch.no_grad():
            return {"prompt_embeddings": prompt()}, {"center": prompt.center, "delta": prompt.delta}  # type: ignore[dict-item]

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        """Take both; without the second file (peft's), the balls are around where the vectors are."""
        own = self.export(pieces)[1]
        vectors = take_prompt(tensors, own["delta"].shape)
        if not extra:
            extra |= {"center": vectors, "delta": torch.zeros_like(vectors)}
        take_all(own, extra)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        """peft's CPTConfig, which is of causal language models only."""
        if task_type(index.model) != "CAUSAL_LM":
            raise UnsupportedError("HF peft has CPT for causal language models only")
        return {
            **peft_fields(len(self.token_ids), sites, index),
            "cpt_token_ids": list(self.token_ids),
            "cpt_mask": [1] * len(self.token_ids),
            "cpt_tokens_type_mask": list(self.types),
            "opt_projection_epsilon": self.epsilon,
            "opt_projection_format_epsilon": self.format_epsilon,
            "opt_weighted_loss_type": "decay" if self.loss_decay != 1 else "none",
            "opt_loss_decay_factor": self.loss_decay,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        """The examples and their balls."""
        return [
            cls(
                token_ids=tuple(config["cpt_token_ids"]),
                token_types=tuple(config["cpt_tokens_type_mask"]),
                epsilon=config["opt_projection_epsilon"],
                format_epsilon=config["opt_projection_format_epsilon"],
                loss_decay=config["opt_loss_decay_factor"] if config["opt_weighted_loss_type"] == "decay" else 1.0,
            )
        ]
