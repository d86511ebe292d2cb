"""Ask a masked language model: the logits of the labels' words at the mask.

    s(l | x) = mean over the words w of l of  Σ_i M_i(w_i | P(x))      raw logits at the i-th mask, averaged over words

softmax over the labels alone, never over the vocabulary (Schick & Schütze 2021, arXiv:2001.07676). With several masks,
as in {mask*2}, all of them are read in one pass (Wiegmann et al. 2023, arXiv:2312.16975); `MultiMaskScorer` fills them
one after another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.methods.restricted_head import restricted_to
from inlay.fewshot.prompts.encoding import Encoded, Encoder
from inlay.fewshot.prompts.template import Row, Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.head_rows import head_rows
from inlay.fewshot.scorers.scorer import MODEL_INPUTS, Batch, Demonstration, Scorer
from inlay.tasks.head_positions import logits_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskScorer(Scorer):
    """A pattern and a verbalizer (PET's PVP). Raises ConfigError where words and masks do not fit."""

    auto: ClassVar[str] = "masked-lm"

    verbalizer: Verbalizer
    demonstration_tokens: int | None = None
    """Tokens kept of a demonstration's column (None: all)."""
    restrict: bool = False
    """Compute the logits of the words' tokens alone: the same numbers, without the rest of the vocabulary."""

    def __post_init__(self) -> None:
        self.template.need_mask()
        if self.template.masks is None:
            raise ConfigError(f"{self.template.source!r} has {{mask*}}, whose words need MultiMaskScorer")
        self._words  # noqa: B018 - what cannot be asked is an error now, not at the first batch

    @property
    @override
    def labels(self) -> tuple[str, ...]:
        return self.verbalizer.labels

    @functools.cached_property
    def encoder(self) -> Encoder:
        """From rendered examples to ids."""
        return Encoder(self.template, self.tokenizer, self.max_length, self.demonstration_tokens)

    @functools.cached_property
    def _words(self) -> tuple[Tensor, Tensor]:
        """Token ids (labels, words, masks) and weights (labels, words): 1/|words| for each that is there."""
        found = list(self.verbalizer.tokens(self.tokenizer, self.template).values())
        most = max(len(words) for words in found)
        ids = torch.tensor([[*words, *[words[0]] * (most - len(words))] for words in found])
        weights = torch.tensor([[1 / len(words)] * len(words) + [0.0] * (most - len(words)) for words in found])
        return ids, weights

    @override
    def encode(
        self, rows: Sequence[Row], demonstrations: Sequence[Sequence[Demonstration]] | None = None
    ) -> list[Encoded]:
        return self._encoded(rows, demonstrations, masks=1)

    def _encoded(
        self, rows: Sequence[Row], demonstrations: Sequence[Sequence[Demonstration]] | None, masks: int
    ) -> list[Encoded]:
        """Rows as token ids; `masks` is the width of {mask*}."""
        shown = demonstrations or [()] * len(rows)
        spoken = self.verbalizer.spoken
        return self.encoder(
            [
                self.template.render(row, masks=masks, demonstrations=[(other, spoken(label)) for other, label in own])
                for row, own in zip(rows, shown, strict=True)
            ]
        )

    def mask_logits(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The vocabulary's logits at the masks, (rows, masks, vocabulary)."""
        logits = logits_at(model, batch["masks"], **{name: batch[name] for name in MODEL_INPUTS})
        return logits.reshape(len(batch["masks"]), -1, logits.shape[-1])

    @override
    def __call__(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        with self._columns(model, batch["input_ids"].device) as columns:
            logits = self.mask_logits(model, batch).float()
        ids, weights = (tensor.to(logits.device) for tensor in self._words)
        if columns is not None:
            ids = (ids[..., None] == columns).long().argmax(-1)
        masks = torch.arange(ids.shape[-1], device=logits.device)
        return (logits[:, masks, ids].sum(-1) * weights).sum(-1)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of all words, sorted."""
        return tuple(sorted(set(self._words[0].flatten().tolist())))

    @contextlib.contextmanager
    def _columns(self, model: PreTrainedModel, device: torch.device) -> Iterator[Tensor | None]:
        """Which tokens the model's logits are of within the block; None: the whole vocabulary.

        Raises ConfigError for a model whose restricted head lacks some of the words.
        """
        fixed = restricted_to(model)
        if fixed is not None and not set(self.tokens) <= set(fixed):
            lacking = self.tokenizer.convert_ids_to_tokens([token for token in self.tokens if token not in fixed])
            raise ConfigError(f"the adapter's restricted head has no {', '.join(lacking)}: it was made for other words")
        if fixed is not None or not self.restrict:
            yield None if fixed is None else torch.tensor(fixed, device=device)
            return
        own = torch.tensor(self.tokens, device=device)
        with head_rows(model, own) as narrowed:
            yield own if narrowed else None

    @override
    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "mask",
            "template": self.template.source,
            "verbalizer": {label: list(words) for label, words in self.verbalizer.words.items()},
            "max_length": self.max_length,
            "demonstration_tokens": self.demonstration_tokens,
            **({"restrict": True} if self.restrict else {}),
        }

    @override
    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Self:
        return cls(
            tokenizer=tokenizer,
            template=Template(fields["template"]),
            verbalizer=Verbalizer(fields["verbalizer"]),
            max_length=fields["max_length"],
            demonstration_tokens=fields["demonstration_tokens"],
            restrict=fields.get("restrict", False),
        )
