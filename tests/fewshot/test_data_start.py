"""Methods that see rows before they are attached see the labelled ones, as the scorer asks them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

import inlay
from inlay.errors import ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.data_start import shown
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.stages import Stages
from inlay.methods.sparse import SparseDelta

ROWS = [{"text": text} for text in ("good", "a bad film", "really great", "never ever", "fine", "no")]
LABELS = ["pos", "neg", "pos", "neg", "pos", "neg"]
WORDS = Verbalizer({"neg": "bad", "pos": "good"})


def scorer(tokenizer: PreTrainedTokenizerFast, source: str = "{text} it was {mask}.") -> MaskScorer:
    return MaskScorer(tokenizer=tokenizer, template=Template(source), verbalizer=WORDS, max_length=32)


def test_the_entries_are_those_with_the_largest_gradients(
    bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    name, made = "bert.encoder.layer.0.output.dense.weight", scorer(tokenizer)
    method = SparseDelta(score="gradient", budget=40, targets=f"re:{name}")
    (found,) = shown([method], bert, made, ROWS, LABELS, batch_size=2, seed=3)
    assert isinstance(found, SparseDelta)
    assert isinstance(found.subset, inlay.Subset)
    targets = torch.tensor([1, 0, 1, 0, 1, 0])
    loss = functional.cross_entropy(made(bert, made.collate(made.encode(ROWS))), targets)
    (gradient,) = torch.autograd.grad(loss, [bert.get_parameter(name)])
    expected = gradient.abs().flatten().topk(40).indices
    assert found.subset.entries[name].tolist() == sorted(expected.tolist())


@pytest.mark.parametrize("method", [SparseDelta(budget=0.01), inlay.LoRA(r=2, init="lora_ga")])
def test_an_adapter_that_goes_on_has_the_places_of_the_one_before(
    method: inlay.engine.piece.Method, bert_folder: Path, tmp_path: Path
) -> None:
    problem = Problem(
        base=Base(str(bert_folder), device="cpu"), labels=("neg", "pos"), train=Labelled(rows=ROWS, labels=LABELS),
        templates=(Template("{text} it was {mask}."),), verbalizer=WORDS, text=Template("{text}"), methods=(method,),
        recipe=Recipe(steps=2, batch_size=2),
    )  # fmt: skip
    made, stages = scorer(problem.base.tokenizer), Stages(tmp_path)
    other = [{"text": "world news"}, {"text": "the movie"}], torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    first = problem.trained(stages, "first", made, other, recipe=Recipe(steps=2, batch_size=1), seed=8)
    still = problem.trained(stages, "second", made, recipe=Recipe(steps=0), seed=9, start=first.adapter)
    assert torch.equal(still.scores(problem.base, ROWS), first.scores(problem.base, ROWS))


def test_others_are_left_as_they_are(bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    methods = [inlay.LoRA(r=2), inlay.BitFit()]
    assert shown(methods, bert, scorer(tokenizer), ROWS, LABELS, batch_size=2, seed=0) == methods


def test_soft_slots_have_no_vectors_yet(bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="SparseDelta looks at rows before anything is trained"):
        shown([SparseDelta()], bert, scorer(tokenizer, "{text} {soft:2} {mask}"), ROWS, LABELS, batch_size=2, seed=0)
