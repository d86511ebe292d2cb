"""Causal language modelling: go on from a prompt, an instruction, a conversation, or plain text.

    loss = mean cross-entropy of the learned tokens: those of completions and assistant turns, or all

Rows are plain text (text), prompt/completion, source/target, instruction/input/target, or messages. A prompt and its
completion are tokenised so that the prompt's tokens are exactly those that generation starts from. What is longer than
`max_length` is cut into several examples (plain text), or loses the beginning of its prompt first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from typing_extensions import override

from inlay.errors import ConfigError, DataError
from inlay.tasks import chat
from inlay.tasks import columns as named_columns
from inlay.tasks.batches import IGNORE, Pass, check_fit, length_limit, padder, summed_loss
from inlay.tasks.chat import Segment
from inlay.tasks.columns import texts
from inlay.tasks.data import place, source_name
from inlay.tasks.generation import generate
from inlay.tasks.loading import load_pretrained
from inlay.tasks.packing import check_packing, pack
from inlay.tasks.prompts import ALIASES, default_template, guess_pair, need_references, prompts, references
from inlay.tasks.task import Collator, Task
from inlay.tasks.text_metrics import check, text_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM(Task):
    """Prompts to completions, or text to more of it."""

    kind: ClassVar[str] = "causal-lm"
    roles: ClassVar[tuple[str, ...]] = ("text", "source", "target", "instruction", "input", "messages")

    max_length: int = 512
    """Tokens in an example at most, special tokens included."""
    prompt_template: str | None = None
    """How a row becomes its prompt, such as "Q: {source}\\nA: "; fields are roles or columns. None: by the columns."""
    completion_only: bool = True
    """Learn the completion (or the assistant's turns) only, not the prompt."""
    add_eos: bool = True
    """End every completion, or text, with the end-of-text token, so that generation learns to stop."""
    packing: bool = False
    """Put several examples into one row of `max_length` tokens, each seeing only itself (training only)."""
    max_new_tokens: int = 64
    """Tokens to generate for a row at most."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    metrics: tuple[str, ...] = ()
    """Text metrics to compute by generation beside the loss: exact_match, rouge, bleu."""

    def __post_init__(self) -> None:
        if isinstance(self.columns, Mapping):
            if "prompt" in self.columns and self.prompt_template is None:
                object.__setattr__(self, "prompt_template", "{source}")
            columns = {ALIASES.get(role, role): column for role, column in self.columns.items()}
            object.__setattr__(self, "columns", columns)
        super().__post_init__()
        check(self.metrics)

    # -- from the data -----------------------------------------------------------------------------------------------

    @override
    def guess(self, rows: Dataset) -> dict[str, str]:
        given = dict(self.columns)
        if "text" in given or "messages" in given:
            return given
        if not given:
            lists = named_columns.list_columns(rows)
            messages = named_columns.named(rows, named_columns.MESSAGES, without=set(rows.column_names) - set(lists))
            if messages is not None:
                return {"messages": messages}
        if (pair := guess_pair(rows, given)) is not None:
            return pair
        if given:
            raise named_columns.cannot_guess(rows, "target" if "target" not in given else "source")
        return {"text": named_columns.guess_text(rows)}

    @override
    def complete(self, splits: Mapping[str, Dataset]) -> Self:
        task = self
        if self._style() == "pair" and self.prompt_template is None:
            task = dataclasses.replace(self, prompt_template=default_template(self.columns))
        if self._style() == "text" and self.metrics:
            raise ConfigError(f"metrics={list(self.metrics)} compare with targets, and the rows are plain text")
        for split, rows in splits.items():
            task._prompts_read(rows)
            if self._style() == "pair":
                (references if split == "test" else need_references)(rows, self.column("target"))
        return task

    @override
    def details(self) -> str:
        return f"prompt: {self.prompt_template!r} (change with prompt_template)" if self._style() == "pair" else ""

    def _style(self) -> str:
        """What the rows are: "text", "messages" or "pair"."""
        for role in ("text", "messages"):
            if role in self.columns:
                return role
        if "source" not in self.columns and "instruction" not in self.columns:
            self.column("source")  # raises: not resolved
        return "pair"

    def _prompts_read(self, rows: Dataset) -> None:
        """Read everything that a prompt is made of, for the errors."""
        if self._style() == "text":
            texts(rows, self.column("text"), "text")
        elif self._style() == "messages":
            chat.conversations(rows, self.column("messages"))
        else:
            prompts(rows, self.columns, self.prompt_template or default_template(self.columns))

    # -- the model ---------------------------------------------------------------------------------------------------

    @property
    @override
    def primary_metric(self) -> tuple[str, bool]:
        return ("loss", False)

    @override
    def load_model(self, model: str | Path, **kwargs: Any) -> PreTrainedModel:
        return load_pretrained(
            AutoModelForCausalLM, model, purpose=self.kind, new_head=False, fits=_looks_back_only, **kwargs
        )

    # -- rows to examples --------------------------------------------------------------------------------------------

    def _segments(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[list[Segment]]:
        """Row by row the text in pieces, each marked as learned or not."""
        if self._style() == "text":
            return [[(text, True)] for text in texts(rows, self.column("text"), "text")]
        if self._style() == "messages":
            return self._chat_segments(rows, tokenizer)
        starts = prompts(rows, self.columns, self.prompt_template or default_template(self.columns))
        ends = need_references(rows, self.column("target"))
        return [[(start, False), (several[0], True)] for start, several in zip(starts, ends, strict=True)]

    def _chat_segments(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[list[Segment]]:
        found = []
        for index, messages in enumerate(chat.conversations(rows, self.column("messages"))):
            pieces = chat.segments(tokenizer, messages)
            if not pieces:
                why = "has no assistant turn" if pieces == [] else "does not fit the tokenizer's chat template"
                raise DataError(f"{place(rows, index)}: the conversation {why}; mend the row or leave it out")
            found.append(pieces)
        return found

    def _examples(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
        """input_ids and labels of every example, none longer than `max_length`."""
        limit, plain, found = length_limit(tokenizer, self.max_length), self._style() == "text", []
        for pieces in self._segments(rows, tokenizer):
            ids, labels = encode(tokenizer, pieces, learn_all=not self.completion_only)
            if self.add_eos and self._ends_with_eos() and tokenizer.eos_token_id is not None:
                ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
            cuts = range(0, len(ids), limit) if plain else [cut_at(labels, limit)]
            bos = ids[0] if ids[0] == tokenizer.bos_token_id else None
            for start in cuts:
                example = {"input_ids": ids[start : start + limit], "labels": labels[start : start + limit]}
                if start and bos is not None and not plain:
                    example["input_ids"][0], example["labels"][0] = bos, IGNORE
                if any(label != IGNORE for label in example["labels"][1:]):
                    found.append(example)
        return found

    def _ends_with_eos(self) -> bool:
        return self._style() != "messages"  # a chat template ends its turns by itself

    @override
    def features(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, train: bool) -> Dataset:
        """input_ids, attention_mask and labels; with `packing` in training input_ids, position_ids and labels."""
        examples = self._examples(rows, tokenizer)
        if not examples:
            raise DataError(f"{source_name(rows)}: no row has two tokens or more to learn from")
        if train and self.packing:
            return Dataset.from_list(pack(examples, length_limit(tokenizer, self.max_length)))
        return Dataset.from_list([example | {"attention_mask": [1] * len(example["labels"])} for example in examples])

    @override
    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
        check_fit(model, tokenizer, self.max_length)
        if self.packing:
            check_packing(model)
        return padder(tokenizer, model, labels=IGNORE, position_ids=0)

    # -- results -----------------------------------------------------------------------------------------------------

    @override
    def labelled(self, rows: Dataset) -> bool:
        return self._style() != "pair" or references(rows, self.column("target")) is not None

    @override
    def scores(self, rows: Dataset, through: Pass) -> dict[str, float]:
        """loss (nats a learned token), perplexity, and the chosen text metrics."""
        features = self.features(rows, through.tokenizer, train=False)
        total, count = 0.0, 0
        for _, batch in through.batches(features, padder(through.tokenizer, through.model, labels=IGNORE)):
            labels = batch.pop("labels")[:, 1:]
            learned = labels != IGNORE
            logits = through.model(**batch).logits[:, -labels.shape[1] - 1 : -1]  # without soft prompts, if any
            total += summed_loss(logits[learned].float(), labels[learned])
            count += int(learned.sum())
        scores = {"loss": total / count, "perplexity": math.exp(min(total / count, 700.0))}
        if self.metrics:
            found = [row["generation"] for row in self.answers(rows, through)]
            scores |= text_scores(self.metrics, found, self._expected(rows))
        return scores

    @override
    def answers(self, rows: Dataset, through: Pass) -> list[dict[str, Any]]:
        """{"prompt", "generation"} a row; a conversation is answered where its last reply stands, or would stand."""
        starts, limit = self._prompts(rows, through.tokenizer), length_limit(through.tokenizer, self.max_length)
        ids = [encode(through.tokenizer, [(start, False)], learn_all=False)[0][-limit:] for start in starts]
        found = generate(through, ids, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)
        return [{"prompt": start, "generation": text} for start, text in zip(starts, found, strict=True)]

    def _prompts(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        if self._style() == "text":
            return texts(rows, self.column("text"), "text")
        if self._style() == "messages":
            return [
                chat.render(tokenizer, chat.before_reply(messages), reply=True)
                for messages in chat.conversations(rows, self.column("messages"))
            ]
        return prompts(rows, self.columns, self.prompt_template or default_template(self.columns))

    def _expected(self, rows: Dataset) -> list[list[str]]:
        """What generation is compared with."""
        if self._style() == "messages":
            return [[messages[-1]["content"]] for messages in chat.conversations(rows, self.column("messages"))]
        return need_references(rows, self.column("target"))


def encode(
    tokenizer: PreTrainedTokenizerBase, segments: list[Segment], *, learn_all: bool
) -> tuple[list[int], list[int]]:
    """(ids, labels) of text in pieces; labels of pieces that are not learned are ignored.

    Each piece is tokenised together with what stands before it, as long as that leaves the earlier tokens as they are.
    """
    text, written = "", list[int]()
    ids, labels = _leading(tokenizer, segments[0][0]), list[int]()
    labels += [IGNORE] * len(ids)
    for piece, learned in segments:
        text += piece
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        fits = whole[: len(written)] == written
        alone = [] if fits else tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        fresh = whole[len(written) :] if fits else alone
        written += fresh
        ids += fresh
        labels += fresh if learned or learn_all else [IGNORE] * len(fresh)
    return ids, labels


def cut_at(labels: list[int], limit: int) -> int:
    """Where to begin so that `limit` tokens follow: the prompt loses its beginning first, but keeps a quarter."""
    first = next((index for index, label in enumerate(labels) if label != IGNORE), 0)
    return max(0, min(len(labels) - limit, first - limit // 4))


def _leading(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The begin-of-text token, where the tokenizer puts one and the text (a chat template's) does not have it yet."""
    bos = tokenizer.bos_token_id
    puts_one = bos is not None and tokenizer("").input_ids[:1] == [bos]
    return [] if not puts_one or text.startswith(str(tokenizer.bos_token)) else [int(bos)]


def _looks_back_only(model: PreTrainedModel) -> bool:
    """False for encoders that transformers loads as language models although they see both sides (BERT, say)."""
    both = model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return not (both and getattr(model.config, "is_decoder", True) is False)
