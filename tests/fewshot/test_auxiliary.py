"""Masked language modelling beside the labels: what is hidden, what it costs, and that a share of 0 is no term."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

from inlay import LoRA
from inlay.errors import ConfigError, DataError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.auxiliary import AuxiliaryMaskedLM
from inlay.fewshot.learning.fitting import Recipe, fit
from inlay.fewshot.learning.objectives import CrossEntropy, Objective, Step
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.head import HeadScorer
from inlay.fewshot.scorers.mask import MaskScorer

TEXTS = ["the film was good", "a bad movie , really", "news", "sports is all the world to me and to you and to us", "x"]
ROWS = [{"text": text} for text in TEXTS]


def mask_scorer(tokenizer: PreTrainedTokenizerFast, template: str = "{text} {sep} It was {mask}.") -> MaskScorer:
    return MaskScorer(
        tokenizer=tokenizer, template=Template(template), verbalizer=Verbalizer({"neg": "bad", "pos": "good"})
    )


def step(scorer: Any, model: Any = None, rows: int = 2, seed: int = 0) -> Step:
    """A training step of so many labelled rows, all the same text."""
    encoded = scorer.encode([{"text": "the news was fine"}] * rows)
    targets = torch.arange(rows) % 2
    return Step(model, scorer, encoded, scorer.collate(encoded), targets, torch.Generator().manual_seed(seed))


def shown(
    objective: AuxiliaryMaskedLM, scorer: MaskScorer, drawn: Step
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The batch before anything is hidden, drawn as `hidden` draws it, and after."""
    order = torch.randperm(len(objective.rows), generator=torch.Generator().set_state(drawn.generator.get_state()))
    count = min(objective.ratio * len(drawn.encoded), len(objective.rows))
    whole = scorer.collate(scorer.encode([objective.rows[index] for index in order[:count].tolist()]))
    return whole["input_ids"], objective.hidden(drawn)[0]


def test_only_words_are_hidden(any_tokenizer: PreTrainedTokenizerFast) -> None:
    """Not padding, not special tokens, not the pattern's mask; and everything else can be."""
    scorer, special = mask_scorer(any_tokenizer), set(any_tokenizer.all_special_ids)
    objective = AuxiliaryMaskedLM(ROWS, probability=0.9)
    hit = set()
    for seed in range(20):
        drawn = step(scorer, seed=seed)
        before, batch = shown(objective, scorer, drawn)
        _, chosen, labels = objective.hidden(step(scorer, seed=seed))
        assert not set(labels.tolist()) & special
        assert not (chosen & batch["masks"]).any()
        assert (batch["input_ids"][batch["masks"]] == any_tokenizer.mask_token_id).all()
        assert torch.equal(labels, before[chosen])
        assert torch.equal(batch["input_ids"][~chosen], before[~chosen])
        assert chosen.any(1).all(), "each row has something to guess"
        hit |= set(labels.tolist())
    words = {token for row in scorer.encode(ROWS) for token in row.ids} - special
    assert hit == words


def test_eighty_ten_ten(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of the chosen 80% are masks, 10% random, 10% as they were. n ≈ 13,000 binomial draws; 4 standard deviations."""
    scorer = mask_scorer(tokenizer, "{text} {mask}")
    rows = [{"text": " ".join(["good", "bad", "film", "news"] * 25)}] * 120
    objective = AuxiliaryMaskedLM(rows, ratio=120, probability=0.5)
    before, batch = shown(objective, scorer, step(scorer, rows=1))
    _, chosen, labels = objective.hidden(step(scorer, rows=1))
    after, count, places = batch["input_ids"][chosen], int(chosen.sum()), 120 * 100
    masks = int((after == tokenizer.mask_token_id).sum())
    kept = int((after == labels).sum())
    for found, share, of in ((count, 0.5, places), (masks, 0.8, count), (kept, 0.1, count)):
        # a random token is the mask, or the token itself, once in a vocabulary of some 250
        assert abs(found - share * of) < 4 * math.sqrt(of * share * (1 - share)) + 0.1 * of / 200
    assert len(set(after.tolist())) > 100, "random tokens come from the whole vocabulary"
    assert before.shape == chosen.shape


def test_ratio_counts_rows_and_none_comes_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    scorer = mask_scorer(tokenizer)
    rows = [{"text": word} for word in ("good", "bad", "film", "news", "sports", "world", "yes", "no")]
    for ratio, labelled, expected in ((3, 2, 6), (1, 2, 2), (3, 4, 8)):
        before, _ = shown(AuxiliaryMaskedLM(rows, ratio), scorer, step(scorer, rows=labelled))
        assert len(before) == expected == len({tuple(row) for row in before.tolist()})


def test_drawn_from_the_steps_generator_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    scorer, objective = mask_scorer(tokenizer), AuxiliaryMaskedLM(ROWS, ratio=1)
    state = torch.get_rng_state()
    first = objective.hidden(step(scorer, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = objective.hidden(step(scorer, seed=1)), objective.hidden(step(scorer, seed=2))
    assert torch.equal(first[0]["input_ids"], again[0]["input_ids"])
    assert torch.equal(first[1], again[1])
    assert first[1].shape != other[1].shape or not torch.equal(first[1], other[1])


def test_the_loss_is_the_mean_over_the_hidden_tokens(tokenizer: PreTrainedTokenizerFast, bert: BertForMaskedLM) -> None:
    scorer, objective = mask_scorer(tokenizer), AuxiliaryMaskedLM(ROWS)
    batch, chosen, labels = objective.hidden(step(scorer))
    logits = bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = functional.cross_entropy(logits[chosen], labels)
    torch.testing.assert_close(objective(step(scorer, bert)), expected)  # the same sums in another order
    both = (0.75 * CrossEntropy() + 0.25 * objective)(step(scorer, bert))
    torch.testing.assert_close(both, 0.75 * CrossEntropy()(step(scorer, bert)) + 0.25 * expected)


def trained(folder: Path, tokenizer: PreTrainedTokenizerFast, objective: Objective) -> dict[str, torch.Tensor]:
    """The adapter after a few steps, with dropout."""
    base = Base(str(folder), device="cpu")
    rows = [{"text": "good film"}, {"text": "bad film"}, {"text": "really good"}]
    with base.adapted("masked-lm", [LoRA(r=2, dropout=0.1)], seed=3) as model:
        fit(
            model, mask_scorer(tokenizer), rows, ["pos", "neg", "pos"], objective=objective, seed=3,
            recipe=Recipe(steps=4, batch_size=2, learning_rate=1e-2),
        )  # fmt: skip
        return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def test_a_share_of_zero_is_no_term_bit_for_bit(bert_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = trained(bert_folder, tokenizer, CrossEntropy())
    masked = AuxiliaryMaskedLM(ROWS)
    without, beside = (trained(bert_folder, tokenizer, (1 - a) * CrossEntropy() + a * masked) for a in (0.0, 0.1))
    assert all(torch.equal(plain[name], without[name]) for name in plain)
    assert not all(torch.equal(plain[name], beside[name]) for name in plain)


def test_what_cannot_be_meant_is_said(tokenizer: PreTrainedTokenizerFast, bert: BertForMaskedLM) -> None:
    with pytest.raises(ConfigError, match="there are none"):
        AuxiliaryMaskedLM([])
    with pytest.raises(ConfigError, match="ratio=0"):
        AuxiliaryMaskedLM(ROWS, ratio=0)
    with pytest.raises(ConfigError, match="probability=0"):
        AuxiliaryMaskedLM(ROWS, probability=0)
    empty = mask_scorer(tokenizer, "{text} {mask}")
    with pytest.raises(DataError, match="no words to hide"):
        AuxiliaryMaskedLM([{"text": ""}])(step(empty, bert))
    head = HeadScorer(tokenizer=tokenizer, template=Template("{text}"), names=("neg", "pos"))
    with pytest.raises(ConfigError, match="this model is a head"):
        AuxiliaryMaskedLM(ROWS)(dataclasses.replace(step(empty), scorer=head))
