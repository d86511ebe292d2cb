"""Soft slots: trained vectors where a template says {soft:3}, between words (P-tuning, first version).

    E'(id) = p_k   for the k-th slot's id, first + k,        E'(id) = E(id)   for all others
    p = e,   MLP(e)   or   MLP(biLSTM(e)),                   e: n trained vectors

Ids from `first` on, the number of tokens that the tokenizer has, are slots: rows that pad an embedding beyond them are
no words. A text without slots is embedded as it was, bit for bit.

Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from inlay.engine.piece import Method, Piece, take, trainable_dtype
from inlay.engine.prompts.entry import prompt_sites
from inlay.engine.prompts.virtual_tokens import Prompt
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import CheckpointError, ConfigError
from inlay.pieces.prompts.encoded import EncodedPrompt
from inlay.pieces.prompts.files import take_all


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftSlots(Method):
    """n vectors between the words of a template (d: width of the token embedding; h, k as in `PTuning`).

    Parameters: as PTuning's with n virtual tokens; without an encoder n · d. The encoder is kept in the second file,
    so that training goes on; what answers needs only the vectors, which are in the first.
    """

    kind = "soft_slots"
    hosts = frozenset({"embedding"})
    paper = "Liu et al. 2021, arXiv:2103.10385"

    first: int
    """The id of the first slot: how many tokens the tokenizer has."""
    starts: Sequence[int | None]
    """For each slot the token whose vector it (or, with an encoder, e) starts as; None: a random start."""
    encoder: Literal["mlp", "lstm"] | None = None
    """What computes the vectors: three linears, a bidirectional LSTM and two linears, or nothing."""
    hidden_size: int | None = None
    """h, the width of the encoder; None: d."""
    num_layers: int = 2
    """k, the layers of the LSTM."""
    dropout: float = 0.0
    """Between the layers of the LSTM."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", tuple(self.starts))
        known = all(start is None or 0 <= start < self.first for start in self.starts)
        if not self.starts or not known:
            raise ConfigError(
                f"SoftSlots(first={self.first}, starts={self.starts!r}): give for each slot a token below "
                f"{self.first}, or None"
            )
        if self.encoder not in ("mlp", "lstm", None):
            raise ConfigError(f"SoftSlots(encoder={self.encoder!r}): choose 'mlp', 'lstm' or None")
        if self.targets is not None or self.exclude is not None or self.layers is not None or self.overrides:
            raise ConfigError("SoftSlots sits at the token embedding: it has no targets, exclude, layers or overrides")

    @override
    def sites(self, index: SiteIndex) -> list[Site]:
        """The token embedding that reads the text, and others that share its table."""
        found = [site for site in prompt_sites(index, "SoftSlots") if isinstance(site.module, nn.Embedding)]
        rows = found[0].in_features
        if max((start for start in self.starts if start is not None), default=-1) >= rows:
            raise ConfigError(f"SoftSlots starts as token {max(s or 0 for s in self.starts)}; the model has {rows}")
        return found

    @override
    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        begin = self._begin(sites[0])
        prompt: nn.Module = Prompt(begin)
        if self.encoder is not None:
            prompt = EncodedPrompt(self, *begin.shape)
            with torch.no_grad():
                prompt.embedding.copy_(begin)
        prompt = prompt.to(sites[0].device, trainable_dtype(sites[0].dtype))
        return [(site, SlotsPiece(prompt, self, owns=site is sites[0])) for site in sites]

    @torch.no_grad()
    def _begin(self, site: Site) -> Tensor:
        """(n, d): the words' vectors as the model sees them, and random ones that spread as the embedding's do."""
        ids = torch.tensor([start or 0 for start in self.starts], device=site.device)
        words: Tensor = site.module(ids).float()
        drawn = torch.randn(words.shape, device=site.device) * site.module(ids.new_tensor(range(8))).float().std()
        given = torch.tensor([start is not None for start in self.starts], device=site.device)
        return torch.where(given[:, None], words, drawn)

    @override
    def export(self, pieces: Sequence[tuple[Site, Piece]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`soft_slots` (n, d), what the encoder gives; beside it, the encoder."""
        prompt = _prompt(pieces)
        training = prompt.training
        with torch.no_grad():
            vectors = prompt.eval()()
        prompt.train(training)
        return {"soft_slots": vectors}, {} if self.encoder is None else prompt.state_dict(keep_vars=True)

    @override
    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        """Take the encoder from the second file; without an encoder, the vectors from the first."""
        expected, encoder = self.export(pieces)
        vectors = take(tensors, "soft_slots", expected["soft_slots"].shape)
        if self.encoder is None:
            encoder, extra = {"vectors": _prompt(pieces)()}, {"vectors": vectors}
        elif not extra:
            raise CheckpointError("the second file, with the encoder behind the soft slots, is missing")
        take_all(encoder, extra)


class SlotsPiece(Piece):
    """On the token embedding: p_k in place of E(first + k)."""

    def __init__(self, prompt: nn.Module, method: SoftSlots, owns: bool) -> None:
        super().__init__()
        self.shared = (prompt,)  # a tuple hides it from registration: one piece has it
        if owns:
            self.prompt = prompt
        self.first, self.count = method.first, len(method.starts)

    @override
    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        name = None if args else next(iter(kwargs))
        ids: Tensor = args[0] if name is None else kwargs[name]
        numbers = ids - self.first
        held = (numbers >= 0) & (numbers < self.count)
        plain = ids.masked_fill(held, 0)
        embedded = inner(plain, *args[1:], **kwargs) if name is None else inner(**{**kwargs, name: plain})
        vectors = self.shared[0]().to(embedded.dtype)[numbers.clamp(0, self.count - 1)]
        return torch.where(held.unsqueeze(-1), vectors, embedded)


def _prompt(pieces: Sequence[tuple[Site, Piece]]) -> nn.Module:
    return next(piece.shared[0] for _, piece in pieces if isinstance(piece, SlotsPiece))
