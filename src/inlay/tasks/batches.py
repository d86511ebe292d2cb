"""From features to padded batches and through the model: what every task's training and evaluation share."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.errors import ConfigError
from inlay.tasks.task_ids import telling

T = TypeVar("T")

IGNORE = -100
"""The label that every loss in torch and transformers skips."""


@dataclasses.dataclass(frozen=True)
class Padder:
    """Collator: each listed column is padded to the longest row of the batch, the others are stacked."""

    pad: Mapping[str, int]
    """Column -> the value that fills it up."""
    drop: frozenset[str] = frozenset()
    """Columns that this model does not take."""
    side: str = "right"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One batch of rows: tensors of (rows, longest), or (rows,) for columns of numbers."""
        names = [name for name in rows[0] if name not in self.drop]
        return {name: self._column(name, [row[name] for row in rows]) for name in names}

    def _column(self, name: str, cells: list[Any]) -> Tensor:
        if name not in self.pad:
            return torch.tensor(cells)
        longest, fill = max(len(cell) for cell in cells), self.pad[name]
        gaps = [[fill] * (longest - len(cell)) for cell in cells]
        left = self.side == "left"
        filled = [[*gap, *cell] if left else [*cell, *gap] for cell, gap in zip(cells, gaps, strict=True)]
        return torch.tensor(filled)


def padder(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, **pad: int) -> Padder:
    """A `Padder` for a tokenizer's columns, plus `pad`: further columns and what fills them."""
    values = {"input_ids": pad_id(tokenizer), "attention_mask": 0, "token_type_ids": 0, **pad}
    segments = getattr(model.config, "type_vocab_size", 0) or 0
    return Padder(values, drop=frozenset() if segments > 1 else frozenset({"token_type_ids"}))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up rows; the attention mask hides it, so that any id serves where there is no padding token."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    return 0


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise ConfigError when the tokenizer is not this model's or examples are longer than it takes.

    Also tells the model which id pads, where it does not know: sequence classifiers on decoders look for it.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is not None and len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}: they do not belong together"
        )
    max_length, positions = length_limit(tokenizer, max_length), getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        raise ConfigError(
            f"max_length={max_length} is more than the {positions} positions of this {model.config.model_type} model: "
            f"set task.max_length={positions} or less"
        )
    if model.config.pad_token_id != tokenizer.pad_token_id and tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id


def length_limit(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """`max_length`, or less where the tokenizer says that its model takes less."""
    return min(max_length, tokenizer.model_max_length)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module's training flag is what it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def summed_loss(logits: Tensor, labels: Tensor) -> float:
    """Cross-entropy of logits (…, classes) summed over the labels (…) that are not ignored, in nats."""
    return functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    ).item()


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of rows through a model: what it needs beside the rows."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    progress: bool
    what: str
    """The name of the pass, for its bar."""
    tasks: Sequence[int] | None = None
    """The task of each row, for a method of several."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[Pass]:
        """The pass in eval mode without gradients."""
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {self.batch_size}")
        with evaluating(self.model):
            yield self

    def batches(
        self, features: Dataset | Sequence[dict[str, Any]], collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """(row numbers, batch on the model's device), rows of like length together so that little is padding."""
        rows = features.to_list() if isinstance(features, Dataset) else features
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].get("input_ids", ())))
        device = next(self.model.parameters()).device
        groups = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        for group in track(groups, self.what, self.progress):
            batch = collate([rows[index] for index in group])
            with telling(self.model, self.tasks, group, batch, len(rows)):
                yield group, {name: tensor.to(device) for name, tensor in batch.items()}


def track(items: list[T], what: str, enabled: bool) -> Iterable[T]:
    """The items, with a bar on a terminal, and a plain line now and then where standard error is none."""
    if not enabled:
        return items
    return tqdm(items, desc=what, leave=False) if sys.stderr.isatty() else _lines(items, what)


def _lines(items: list[T], what: str, every: float = 10.0) -> Iterator[T]:
    begun = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= every:
            left = (now - begun) / done * (len(items) - done)
            print(f"{what}: {done} of {len(items)} batches, about {left:.0f} s left", file=sys.stderr, flush=True)
            last = now
        yield item
