"""Ask a model that writes: how likely it finds each label's words as the answer, whatever number of tokens they have.

    beta(x, y) = 1 / |y|^a  Σ_t log p(y_t | x, y_<t)            a = length_norm: 1 the mean over tokens, 0 the sum
    direct     beta(x, y)
    pmi        beta(x, y) − beta(x without its columns, y)      what the example adds to an answer that is likely anyway
    channel    beta(y, x)                                       how likely the example is, given the answer

A label of several words is as likely as the likeliest of them: they are different ways of answering the same, and a
way that nobody would take should not count against the others, as it would in a mean of logarithms.
An encoder and decoder ends its answers with an end-of-text token, which is counted; a decoder's are followed by none.

Liu et al. 2022, arXiv:2205.05638 (beta); Min et al. 2022, arXiv:2108.04106 (channel); Holtzman et al. 2021,
arXiv:2104.08315 (pmi).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import ConfigError
from inlay.fewshot.prompts.answering import Answering, trailing
from inlay.fewshot.prompts.encoding import Encoded, Encoder
from inlay.fewshot.prompts.template import Rendered, Row, Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.continuations import causal_log_probs, seq2seq_log_probs
from inlay.fewshot.scorers.scorer import Batch, Demonstration, Scorer
from inlay.tasks.batches import length_limit, pad_id

Direction = Literal["direct", "channel", "pmi"]
Pair = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
"""A prompt, and what may follow it."""
SEQUENCES = 256
"""At most so many continuations go through the model at once; one prompt's are never parted."""


@dataclasses.dataclass(frozen=True)
class Asked(Encoded):
    """A row's prompts with their continuations. Direct and pmi: one, followed by each word; channel: one a word."""

    pairs: tuple[Pair, ...] = ()
    null: Pair | None = None
    """The prompt of an example that says nothing (pmi)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceScorer(Scorer):
    """A template and the answers to choose from. Raises ConfigError where they cannot be asked."""

    auto: Literal["causal-lm", "seq2seq"] = "causal-lm"  # type: ignore[misc]  # here it is the user's to say
    """A decoder, or an encoder and decoder."""
    verbalizer: Verbalizer
    length_norm: float = 1.0
    """a: 1 divides by the number of tokens, 0 does not."""
    direction: Direction = "direct"
    """What is asked: the answer, the example given the answer, or the answer beyond its own likelihood."""
    demonstration_tokens: int | None = None
    """Tokens kept of a demonstration's column (None: all)."""
    between: str = "\n"
    """What parts demonstrations."""

    def __post_init__(self) -> None:
        if self.direction not in ("direct", "channel", "pmi"):
            raise ConfigError(f"direction={self.direction!r}: choose one of direct, channel, pmi")
        if self.auto not in ("causal-lm", "seq2seq"):
            raise ConfigError(f"auto={self.auto!r}: choices are put to a causal-lm or a seq2seq model")
        if self.template.soft:
            raise ConfigError(
                f"the template {self.template.source!r} has soft slots, which a mask or a head can be asked with: for "
                "choices train a prompt before the text, as the method prompt_tuning does"
            )
        room = length_limit(self.tokenizer, self.max_length) - (self.longest if self._forwards else 0)
        if room < 1:
            raise ConfigError(
                f"max_length={self.max_length} leaves no room for a prompt before the longest answer, of "
                f"{self.longest} tokens: raise max_length"
            )

    @property
    @override
    def labels(self) -> tuple[str, ...]:
        return self.verbalizer.labels

    @property
    def _forwards(self) -> bool:
        return self.auto == "causal-lm"

    @functools.cached_property
    def answering(self) -> Answering:
        """The template, split at its answer."""
        return Answering(self.template, self.direction == "channel", self.between)

    @functools.cached_property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """The token ids of all words, label after label. Raises ConfigError where two labels' are the same."""
        owners: dict[tuple[int, ...], tuple[str, str]] = {}
        found = []
        for label, words in self.verbalizer.words.items():
            for word in words:
                ids = self.answering.tokens(word, self.tokenizer, forwards=self._forwards)
                other, owner = owners.setdefault(ids, (word, label))
                if owner != label:
                    raise ConfigError(
                        f"{other!r} (for {owner!r}) and {word!r} (for {label!r}) are the same tokens to this "
                        f"tokenizer, {self.tokenizer.convert_ids_to_tokens(list(ids))}: choose other words"
                    )
                found.append(ids)
        return tuple(found)

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return max(map(len, self.choices))

    @functools.cached_property
    def words_of(self) -> Tensor:
        """The numbers of each label's words, (labels, most words); where one has fewer, its first stands again."""
        counts = [len(words) for words in self.verbalizer.words.values()]
        first = [sum(counts[:index]) for index in range(len(counts))]
        most = range(max(counts))
        return torch.tensor([[at + (k if k < count else 0) for k in most] for at, count in zip(first, counts)])  # noqa: B905

    @functools.cached_property
    def _tail(self) -> int:
        """How many tokens the tokenizer sets behind a text that is to be gone on with."""
        return trailing(self.tokenizer) if self._forwards else 0

    def _encoder(self, less: int = 0) -> Encoder:
        limit = length_limit(self.tokenizer, self.max_length) - less + self._tail
        return Encoder(self.answering.whole, self.tokenizer, limit, self.demonstration_tokens)

    def _ids(self, encoded: Encoded) -> tuple[int, ...]:
        """A prompt's ids, to be gone on with: without the tokenizer's end, and never empty."""
        ids = tuple(encoded.ids[: len(encoded.ids) - self._tail])
        if ids:
            return ids
        begin = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        if begin is None:
            raise ConfigError(
                f"the template {self.template.source!r} makes an empty prompt of an example, and this tokenizer has no "
                "token to begin a text with: put words into the template"
            )
        return (int(begin),)

    @override
    def encode(
        self, rows: Sequence[Row], demonstrations: Sequence[Sequence[Demonstration]] | None = None
    ) -> list[Encoded]:
        spoken = self.verbalizer.spoken
        shown = [[(row, spoken(label)) for row, label in own] for own in demonstrations or [()] * len(rows)]
        if self.direction == "channel":
            return [self._given(row, own) for row, own in zip(rows, shown, strict=True)]
        asked, encoder = self.answering, self._encoder(self.longest if self._forwards else 0)
        found = encoder([asked.prompt(row, own) for row, own in zip(rows, shown, strict=True)])
        nulls: list[Pair | None] = [None] * len(rows)
        if self.direction == "pmi":
            empty = encoder([
                asked.prompt(asked.blank(row), own[: prompt.demonstrations])
                for row, own, prompt in zip(rows, shown, found, strict=True)
            ])  # fmt: skip
            nulls = [(self._ids(prompt), self.choices) for prompt in empty]
        return [
            Asked(list(self._ids(prompt)), (), (), prompt.demonstrations, prompt.cut,
                  ((self._ids(prompt), self.choices),), null)
            for prompt, null in zip(found, nulls, strict=True)
        ]  # fmt: skip

    def _given(self, row: Row, shown: Sequence[Demonstration]) -> Asked:
        """The pairs of p(x | y): for each word a prompt that gives it, followed by the example."""
        words = [word for listed in self.verbalizer.words.values() for word in listed]
        whole, starts = self._whole_and_starts(row, words, shown)
        kept = min(full.demonstrations for full in whole)
        if self._forwards:
            pairs = tuple(self._parted(self._ids(full), self._ids(start)) for full, start in zip(whole, starts))  # noqa: B905
        else:
            example: Rendered = self.answering.example(row)
            target = tuple(self._encoder()([example])[0].ids)
            pairs = tuple((self._ids(start), (target,)) for start in starts)
        longest = max(whole, key=len)
        return Asked(list(longest.ids), (), (), kept, longest.cut, pairs)

    def _whole_and_starts(
        self, row: Row, words: Sequence[str], shown: Sequence[Demonstration]
    ) -> tuple[list[Encoded], list[Encoded]]:
        """For each word demonstrations, answer and example; and the same up to where the example begins.

        All have the same demonstrations, and as much of the example as has room behind the longest answer: a text that
        is cut shorter would be likelier.
        """
        encoder = self._encoder()
        whole, starts = encoder([self.answering.given(row, word, shown)[0] for word in words]), list[Encoded]()
        while True:
            kept = min(one.demonstrations for one in (*whole, *starts))
            both = [self.answering.given(row, word, shown[:kept]) for word in words]
            starts = encoder([start for _, start in both])
            longest = max(map(len, starts))
            whole = [
                self._encoder(longest - len(start))([full])[0] for (full, _), start in zip(both, starts, strict=True)
            ]
            if all(one.demonstrations == kept for one in (*whole, *starts)):
                return whole, starts

    @staticmethod
    def _parted(whole: tuple[int, ...], start: tuple[int, ...]) -> Pair:
        """A text in two: as far as it is tokenised as its beginning alone is, and the rest; one token at least."""
        same = next((at for at, (a, b) in enumerate(zip(whole, start)) if a != b), min(len(whole), len(start)))  # noqa: B905
        border = max(same, 1)
        return whole[:border], (whole[border:],)

    @override
    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """input_ids, attention_mask (P, T), choice_ids, choice_mask (P, C, K), and for pmi null_… and null_of (rows,).

        P is rows (direct, pmi) or rows times words (channel), C then words or 1. Everything is padded on the right.
        """
        rows = [row for row in encoded if isinstance(row, Asked)]
        batch = self._padded([pair for row in rows for pair in row.pairs])
        nulls = [row.null for row in rows if row.null is not None]
        if nulls:
            number = {null: index for index, null in enumerate(dict.fromkeys(nulls))}
            batch |= {f"null_{name}": tensor for name, tensor in self._padded(list(number)).items()}
            batch["null_of"] = torch.tensor([number[null] for null in nulls])
        return batch

    def _padded(self, pairs: Sequence[Pair]) -> Batch:
        longest = max(len(prompt) for prompt, _ in pairs)
        width = max(max(len(choice) for choice in choices) for _, choices in pairs)
        ids = torch.full((len(pairs), longest), pad_id(self.tokenizer))
        following = torch.full((len(pairs), len(pairs[0][1]), max(width, 1)), pad_id(self.tokenizer))
        seen, real = torch.zeros_like(ids), torch.zeros_like(following, dtype=torch.bool)
        for index, (prompt, choices) in enumerate(pairs):
            ids[index, : len(prompt)], seen[index, : len(prompt)] = torch.tensor(prompt), 1
            for number, choice in enumerate(choices):
                following[index, number, : len(choice)] = torch.tensor(choice, dtype=torch.long)
                real[index, number, : len(choice)] = True
        return {"input_ids": ids, "attention_mask": seen, "choice_ids": following, "choice_mask": real}

    def token_log_probs(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """log p of each token of each choice, (P, C, K), with gradients; 0 where `choice_mask` is False."""
        ask = causal_log_probs if self._forwards else seq2seq_log_probs
        names = ("input_ids", "attention_mask", "choice_ids", "choice_mask")
        size = max(SEQUENCES // batch["choice_ids"].shape[1], 1)
        found = [
            ask(model, *(batch[name][start : start + size] for name in names))
            for start in range(0, len(batch["input_ids"]), size)
        ]
        return torch.cat(found)

    def beta(self, log_probs: Tensor, real: Tensor) -> Tensor:
        """Σ_t log p / |y|^length_norm: tokens' log-probabilities (P, C, K) to one number a word, (rows, words)."""
        lengths = real.sum(-1).clamp_min(1)
        return (log_probs.sum(-1) / lengths**self.length_norm).reshape(-1, len(self.choices))

    def by_label(self, words: Tensor) -> Tensor:
        """(rows, words) to (rows, labels): the likeliest word of each."""
        return words[:, self.words_of.to(words.device)].amax(-1)

    @override
    def __call__(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        found = self.beta(self.token_log_probs(model, batch), batch["choice_mask"])
        if self.direction == "pmi":
            null = {name.removeprefix("null_"): tensor for name, tensor in batch.items() if name.startswith("null_")}
            found = found - self.beta(self.token_log_probs(model, null), null["choice_mask"])[null["of"]]
        return self.by_label(found)

    @override
    def to_dict(self) -> dict[str, Any]:
        plain = ("auto", "length_norm", "direction", "demonstration_tokens", "between", "max_length")
        return {
            "kind": "choice",
            "template": self.template.source,
            "verbalizer": {label: list(words) for label, words in self.verbalizer.words.items()},
            **{name: getattr(self, name) for name in plain},
        }

    @override
    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Self:
        plain = ("auto", "length_norm", "direction", "demonstration_tokens", "between", "max_length")
        return cls(
            tokenizer=tokenizer,
            template=Template(fields["template"]),
            verbalizer=Verbalizer(fields["verbalizer"]),
            **{name: fields[name] for name in plain},
        )
