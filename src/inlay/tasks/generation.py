"""Greedy or beam-search generation for a list of prompts, in padded batches of like length."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from inlay.errors import ConfigError
from inlay.tasks.batches import Padder, Pass, pad_id
from inlay.tasks.task import Collator


def generate(
    through: Pass,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    beside: Sequence[Mapping[str, Any]] = (),
    wrap: Callable[[Collator], Collator] = lambda text: text,
) -> list[str]:
    """The text that follows each prompt (given as token ids), without special tokens, in the order of the prompts.

    `beside` is what each row gives the model beside its prompt, if anything, and `wrap` makes the collator take it.
    """
    model, tokenizer = through.model, through.tokenizer
    decoder = not model.config.is_encoder_decoder
    if decoder:
        prompts = _within_positions(model, prompts, max_new_tokens)
    side = "left" if decoder else "right"  # a decoder goes on from the last place, which must be a token
    collate = wrap(Padder({"input_ids": pad_id(tokenizer), "attention_mask": 0}, side=side))
    settings = _settings(model, tokenizer, max_new_tokens, num_beams)
    rows: list[dict[str, Any]] = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in prompts]
    rows = [row | dict(more) for row, more in zip(rows, beside, strict=True)] if beside else rows
    texts = [""] * len(rows)
    for indices, batch in dataclasses.replace(through, what="generating").batches(rows, collate):
        output: torch.Tensor = model.generate(**batch, generation_config=settings)  # type: ignore[operator]
        fresh = output[:, batch["input_ids"].shape[1] :] if decoder else output
        for index, text in zip(indices, tokenizer.batch_decode(fresh, skip_special_tokens=True), strict=True):
            texts[index] = text
    return texts


def _settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, num_beams: int
) -> GenerationConfig:
    """The model's own settings (its start and end tokens), made deterministic."""
    settings = copy.deepcopy(model.generation_config) or GenerationConfig()  # type: ignore[no-untyped-call]
    settings.update(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        max_length=None,
        min_length=None,
        do_sample=False,
        num_beams=num_beams,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad_id(tokenizer),
    )
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    return settings


def _within_positions(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Prompts cut at the left, so that the model has positions left for what it generates."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return prompts
    room = positions - max_new_tokens
    if room < 1:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the {positions} positions of this "
            f"{model.config.model_type} model: set a smaller number"
        )
    return [ids[-room:] for ids in prompts]
