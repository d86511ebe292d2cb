"""One base model for a whole few-shot run: patterns, seeds and generations are adapters that take turns in it.

A pattern ensemble of twelve models is one frozen base and twelve small files; nothing is loaded twice, and after each
turn the base is what it was, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from inlay.engine.adapters import attach, detach
from inlay.engine.checkpoint import load
from inlay.engine.four_bit import never_pack
from inlay.engine.piece import Method
from inlay.engine.roles import new_heads
from inlay.errors import ConfigError, did_you_mean
from inlay.fewshot.learning.warm_start import start_from
from inlay.tasks.batches import check_fit
from inlay.tasks.loading import load_pretrained, load_tokenizer
from inlay.tasks.quantised import loading
from inlay.train.trainer import untouched_random_states

AUTO = {
    "masked-lm": AutoModelForMaskedLM,
    "causal-lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "head": AutoModelForSequenceClassification,
}
"""What a scorer asks for, and which of transformers' classes has it."""


@dataclasses.dataclass(frozen=True)
class Base:
    """A pretrained model, by folder or hub id, in the forms that scorers ask; each form is loaded when first used."""

    source: str
    dtype: str = "float32"
    device: str = "auto"
    load: str = "auto"
    """How it is held: as saved (auto), 4bit (QLoRA's) or 8bit."""

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer. Raises ConfigError when there is none."""
        return load_tokenizer(self.source)

    def model(self, auto: str, labels: int = 0) -> PreTrainedModel:
        """The form that a scorer asks for ("masked-lm", …, "head" with so many labels), without any adapter.

        Raises ConfigError when the files have no such head; a classification head alone may be new.
        """
        if auto not in AUTO:
            raise ConfigError(f"there is no form {auto!r} of a model{did_you_mean(auto, AUTO)}: {', '.join(AUTO)}")
        key = (auto, labels if auto == "head" else 0)  # only a head has one for each label
        if key not in self._models:
            options: dict[str, Any] = {"num_labels": labels} if auto == "head" else {}
            with untouched_random_states():
                torch.manual_seed(0)  # a new head is drawn anew by `adapted`; until then it is the same everywhere
                made = load_pretrained(
                    AUTO[auto], self.source, purpose=auto, new_head=auto == "head", **loading(self.load, self.dtype),
                    **options,
                )  # fmt: skip
            never_pack(made)
            check_fit(made, self.tokenizer, 1)
            self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, _places(made))
            chosen = "cuda" if torch.cuda.is_available() else "cpu"
            placed: Any = made
            if self.load == "auto":  # bitsandbytes has placed the others
                placed = placed.to(chosen if self.device == "auto" else self.device)
            self._models[key] = placed.eval()
        return self._models[key]

    @functools.cached_property
    def _models(self) -> dict[tuple[str, int], PreTrainedModel]:
        return {}

    @contextlib.contextmanager
    def adapted(
        self,
        auto: str,
        methods: Sequence[Method],
        *,
        seed: int,
        labels: int = 0,
        start: str | Path | None = None,
        prepare: Callable[[PreTrainedModel, Sequence[Method]], Sequence[Method]] = lambda model, methods: methods,
    ) -> Iterator[PreTrainedModel]:
        """The model with a fresh adapter (and, where its head is new, a fresh head) in it; taken out at the end.

        With `start` the adapter has the values of a saved one (`learning/warm_start.py`). `prepare` may change the
        methods once it has the model as it is before they are attached (`learning/data_start.py`).
        """
        model = self.model(auto, labels)
        fresh = sorted({name.rpartition(".")[0] for name in getattr(model, "fresh_parameters", ())})
        heads = [head for head in new_heads(model) if any(f"{path}.".startswith(f"{head}.") for path in fresh)]
        whole = [*heads, *(path for path in fresh if not any(f"{path}.".startswith(f"{head}.") for head in heads))]
        with untouched_random_states():
            torch.manual_seed(seed)
            for path in fresh:
                _draw(model, path)
            attach(model, list(prepare(model, methods)), modules_to_save=whole)
        try:
            if start is not None:
                start_from(model, start)
            yield model
        finally:
            detach(model)

    @contextlib.contextmanager
    def holding(self, auto: str, adapter: str | Path | None, labels: int = 0) -> Iterator[PreTrainedModel]:
        """The model with a saved adapter in it (None: as it is); taken out at the end."""
        model = self.model(auto, labels)
        if adapter is None:
            yield model
            return
        load(model, adapter)
        try:
            yield model
        finally:
            detach(model)


def _places(model: PreTrainedModel) -> float:
    """How many tokens the model has places for: some tokenizers do not say, and a text would run over the end."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return math.inf
    tables = (getattr(module, "position_embeddings", None) for module in model.modules())
    unused = [place for table in tables if isinstance(place := getattr(table, "padding_idx", None), int)]
    return limit - max(unused) - 1 if unused else limit  # RoBERTa counts from behind its padding's place


def _draw(model: PreTrainedModel, path: str) -> None:
    """New random numbers for a module that the base's files have none for, as its architecture draws them."""
    module: Any = model.get_submodule(path)
    module._is_hf_initialized = False
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = False
    model._init_weights(module)  # type: ignore[no-untyped-call]
