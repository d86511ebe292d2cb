"""Prompt tuning: n trained vectors stand before the text, where n tokens more would have stood.

Lester, Al-Rfou, Constant (2021), "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691.

    E' = [p_1 … p_n ; E(x)]        prepended (the paper)
    E'_i = E(x)_i + p_i, i ≤ n     added onto the first n tokens of the text

With an ensemble, k prompts run side by side in one batch: the loss is the mean of their losses, so that each learns by
itself, and the prediction is the mean of their logits (or log-probabilities).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from inlay.engine.piece import Method, Piece, trainable_dtype
from inlay.engine.prompts.calls import Combine
from inlay.engine.prompts.entry import peft_fields, prompt_of, prompt_pieces, prompt_sites, take_prompt
from inlay.engine.prompts.virtual_tokens import Prompt
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.prompts.checks import check_counts, check_entry
from inlay.pieces.prompts.saved import starting_vectors
from inlay.pieces.prompts.start import Init, initial_prompt
from inlay.pieces.prompts.transfer import Transfer

if TYPE_CHECKING:
    from inlay.engine.sites import Site, SiteIndex


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(Transfer):
    """n trained input vectors (d: width of the token embedding). Parameters: ensemble · num_virtual_tokens · d.

    Encoders and decoders see the prompt before their text; in an encoder–decoder it stands before the source. Outputs
    (of `generate`, too) have the base's shapes, except `attentions` and, of an encoder–decoder, `encoder_*`, which show
    the prompt as well. Prepended, it is HF peft's PROMPT_TUNING. As there, padding on the left lies between prompt and
    text; where distances count (sliding windows, T5's encoder), pad on the right.
    """

    kind = "prompt_tuning"
    hosts = frozenset({"module", "embedding"})
    peft_type = "PROMPT_TUNING"
    paper = "Lester et al. 2021, arXiv:2104.08691"

    num_virtual_tokens: int = 20
    """n, the vectors of one prompt."""
    position: Literal["prepended", "added"] = "prepended"
    """Before the text, or added onto the embeddings of its first n tokens (padding aside)."""
    init: Init | None = None
    """How the vectors start: "random" (normal, with the embedding's own standard deviation), "vocabulary" (embeddings
    of tokens drawn at random), "text" (those of `text`, repeated or cut to n), "labels" (one vector for each label's
    name, the others from the vocabulary), "zeros". None: "vocabulary" when prepended, "zeros" when added."""
    text: str | tuple[str, ...] | None = None
    """For init="text": the text, or one for each prompt of an ensemble."""
    labels: tuple[str, ...] | None = None
    """For init="labels": the names; None takes the model's own (config.id2label)."""
    tokenizer: str | None = None
    """For these two: name or folder of the tokenizer; None takes the model's own."""
    ensemble: int = 1
    """k, prompts that run side by side in one batch, whose predictions are combined."""
    combine: Combine = "logits"
    """What an ensemble averages: "logits" or "log_probabilities"."""

    def __post_init__(self) -> None:
        check_counts(self, "num_virtual_tokens", "ensemble")
        choices = {"position": ("prepended", "added"), "combine": ("logits", "log_probabilities")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{type(self).__name__}({name}={getattr(self, name)!r}): choose {' or '.join(allowed)}"
                )
        check_entry(self)
        if self.init_from is not None and (self.init or self.text or self.labels):
            raise ConfigError(
                f"{type(self).__name__}(init_from={self.init_from!r}) and another start: keep one of them"
            )
        self.check_transfer()

    def sites(self, index: SiteIndex) -> list[Site]:
        """The model, its encoder if it is an encoder–decoder, and the token embedding that reads the text."""
        return prompt_sites(index, type(self).__name__)

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        """The prompt's vectors, and the pieces that put them in."""
        embedding = sites[-1].module
        assert isinstance(embedding, nn.Embedding)
        added = self.position == "added"
        init = self.init or ("zeros" if added else "vocabulary")
        n = self.num_virtual_tokens
        if self.init_from is not None:
            shape = (n, embedding.embedding_dim)
            vectors = starting_vectors(model, self.init_from, self.init_weights, shape, self.ensemble, prefix=False)
        else:
            vectors = initial_prompt(model, embedding, n, self.ensemble, init, self.text, self.labels, self.tokenizer)
        prompt = Prompt(vectors.to(sites[-1].device, trainable_dtype(sites[-1].dtype)))
        pieces = prompt_pieces(sites, prompt, n, self.ensemble, added, self.combine)
        pieces[1:1] = self.recorder(model, sites[0])  # around the piece at the model's entry
        return pieces

    def for_file(self) -> Method:
        """The method as a file describes it: how the vectors started no longer matters."""
        start = {"init": "zeros", "text": None, "labels": None, "tokenizer": None}
        return self.replace(**start, init_from=None, init_weights=None)

    def export(self, pieces: Sequence[tuple[Site, Piece]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`prompt_embeddings`: (ensemble · n, d)."""
        return {"prompt_embeddings": prompt_of(pieces)()}, {}

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        """Take the vectors from the file; of the two prompts that peft writes for an encoder–decoder, the first."""
        parameter = prompt_of(pieces)()
        with torch.no_grad():
            parameter.copy_(take_prompt(tensors, parameter.shape))

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        """peft's PromptTuningConfig; UnsupportedError for what it has no fields for."""
        if self.position == "added" or self.ensemble > 1:
            raise UnsupportedError("HF peft has neither added prompts nor prompt ensembles")
        tables = [site for site in sites if isinstance(site.module, nn.Embedding)]
        return {**peft_fields(self.num_virtual_tokens, tables, index), "prompt_tuning_init": "RANDOM"}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        """Prepended vectors, whatever they were started from."""
        return [cls(num_virtual_tokens=config["num_virtual_tokens"], init="zeros")]
