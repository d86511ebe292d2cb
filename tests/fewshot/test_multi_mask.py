"""Words of several tokens: the batched decoding is the plain one, whatever else is in the batch or the verbalizer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot import toys
from torch.nn import functional
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

import inlay
from inlay.errors import ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.fitting import Recipe, fit
from inlay.fewshot.learning.objectives import CrossEntropy, Hinge, Step
from inlay.fewshot.predictor import Solution
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.kinds import scorer_from_dict
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.scorers.multi_mask import DECODES, MultiMaskScorer
from inlay.fewshot.stages import Stages
from inlay.fewshot.systems.prompt import Prompt
from inlay.methods.lora import LoRA

LONG = {
    "a": "good",
    "b": ["bad film", "really bad"],
    "c": "bad news",
    "d": ["the world news", "no"],
    "e": "the world is bad",
}


def rows(count: int = 7) -> list[dict[str, str]]:
    draw = random.Random(0)
    return [{"text": " ".join(draw.choices(toys.WORDS, k=draw.randint(1, 12)))} for _ in range(count)]


def scorer(
    tokenizer: PreTrainedTokenizerFast,
    words: Mapping[str, str | Sequence[str]] = LONG,
    source: str = "{text} It was {mask*}.",
    **fields: Any,
) -> MultiMaskScorer:
    return MultiMaskScorer(
        tokenizer=tokenizer, template=Template(source), verbalizer=Verbalizer(words), **{"max_length": 64, **fields}
    )


@torch.no_grad()
def plain(model: Any, made: MultiMaskScorer, row: dict[str, str], word: tuple[int, ...]) -> float:
    """One row, one word, all logits at every step."""
    encoded = made.encoder([made.template.render(row, masks=len(word))])[0]
    ids, left, total = torch.tensor([encoded.ids]), list(zip(encoded.masks, word, strict=True)), 0.0
    while left:
        log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        if made.decode == "parallel":
            return sum(log_p[place, token].item() for place, token in left)
        place, token = left[0] if made.decode == "ltr" else max(left, key=lambda entry: log_p[entry].item())
        total += log_p[place, token].item()
        ids[0, place] = token
        left.remove((place, token))
    return total


def plain_scores(model: Any, made: MultiMaskScorer) -> torch.Tensor:
    words = made.verbalizer.tokens(made.tokenizer, made.template)
    return torch.tensor(
        [
            [sum(plain(model, made, row, ids) for ids in listed) / len(listed) for listed in words.values()]
            for row in rows()
        ]
    )


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("source", ["{text} It was {mask*}.", "{mask*}: {text}"])
def test_batched_decoding_is_the_plain_one(
    decode: str, source: str, bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = scorer(tokenizer, source=source, decode=decode)
    expected = plain_scores(bert, made)
    for batch_size in (1, 3, 64):
        torch.testing.assert_close(made.scores(bert, rows(), batch_size=batch_size), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("decode", DECODES)
def test_every_family_decodes_as_the_plain_one(decode: str, any_tokenizer: PreTrainedTokenizerFast) -> None:
    model = toys.tiny_bert(len(any_tokenizer))
    words = {"a": "good", "b": "xq", "c": "world news", "d": "no good"}
    made = scorer(any_tokenizer, words, decode=decode)
    torch.testing.assert_close(made.scores(model, rows()), plain_scores(model, made), atol=1e-4, rtol=1e-5)


def test_words_of_one_token_are_the_single_masks_log_softmax(
    bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = {"neg": ["bad", "awful"], "pos": "great"}
    found = [scorer(tokenizer, words, decode=decode).scores(bert, rows()) for decode in DECODES]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    single = MaskScorer(
        tokenizer=tokenizer, template=Template("{text} It was {mask}."), verbalizer=Verbalizer(words), max_length=64
    )
    with torch.no_grad():
        log_p = single.mask_logits(bert, single.collate(single.encode(rows()))).log_softmax(-1)[:, 0]
    ids = tokenizer.convert_tokens_to_ids(["bad", "awful", "great"])
    expected = torch.stack([log_p[:, ids[:2]].mean(-1), log_p[:, ids[2]]], -1)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
    singly = single.scores(bert, rows()).softmax(-1)  # the same answer, up to what all labels share
    torch.testing.assert_close(found[0].softmax(-1), singly, atol=1e-5, rtol=1e-4)


def test_orders_agree_where_places_are_independent(tokenizer: PreTrainedTokenizerFast) -> None:
    model = toys.by_place(len(tokenizer))
    found = [scorer(tokenizer, decode=decode).scores(model, rows()) for decode in DECODES]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_orders_differ_where_words_depend_on_their_neighbours(tokenizer: PreTrainedTokenizerFast) -> None:
    model = toys.markov(tokenizer)
    found = [scorer(tokenizer, decode=decode).scores(model, rows()) for decode in DECODES]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (found[one] - found[other])[:, 3:].abs().min() > 1e-3
        torch.testing.assert_close(found[one][:, 0], found[other][:, 0])  # one token: nothing to order
    for decode in DECODES:
        made = scorer(tokenizer, decode=decode)
        torch.testing.assert_close(made.scores(model, rows()), plain_scores(model, made), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("decode", DECODES)
def test_other_labels_do_not_matter_to_a_score(
    decode: str, bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    together = scorer(tokenizer, decode=decode, max_length=18).scores(bert, rows())  # where most rows are cut
    for index, (label, words) in enumerate(LONG.items()):
        alone = scorer(tokenizer, {label: words}, decode=decode, max_length=18).scores(bert, rows())
        torch.testing.assert_close(together[:, index], alone[:, 0], atol=1e-5, rtol=1e-5)


def test_training_reads_all_masks_in_one_pass(bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    made = scorer(tokenizer)
    encoded = made.encode(rows())
    assert made.width == 4
    assert {len(row.masks) for row in encoded} == {4}
    scores = made(bert, made.collate(encoded))
    words = made.verbalizer.tokens(tokenizer, made.template)
    for row, found in zip(encoded, scores, strict=True):
        log_p = bert(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        expected = [
            sum(sum(log_p[at, token] for at, token in zip(row.masks, ids, strict=False)) for ids in listed)
            / len(listed)
            for listed in words.values()
        ]
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-5)  # type: ignore[arg-type]
    scores.sum().backward()
    assert bert.bert.embeddings.word_embeddings.weight.grad is not None


def test_hinge_is_its_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(5, 4, generator=draw), torch.tensor([0, 3, 1, 1, 2])

    def value(margin: float, given: torch.Tensor, wanted: torch.Tensor = targets) -> torch.Tensor:
        step = Step(None, None, [], {}, wanted, draw)  # type: ignore[arg-type]
        step._scores = given
        return Hinge(margin)(step)

    for margin in (0.0, 1.0, 2.5):
        expected = sum(
            max(0.0, margin - scores[n, y].item() + scores[n, wrong].item())
            for n, y in enumerate(targets.tolist())
            for wrong in range(4)
            if wrong != y
        )
        assert value(margin, scores).item() == pytest.approx(expected / 5, rel=1e-5)
    far = functional.one_hot(targets, 4) * 10.0
    assert value(1.0, far).item() == 0
    with pytest.raises(ConfigError, match="targets are probabilities"):
        value(1.0, scores, scores.softmax(-1))


def test_the_hinge_is_what_it_is_trained_with(tokenizer: PreTrainedTokenizerFast) -> None:
    model = toys.tiny_bert(len(tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    made = scorer(tokenizer, {"neg": "all no", "pos": "all yes"}, "{text} is {mask*}")
    data = [{"text": text} for text in ("good", "bad", "good film", "bad film")], ["pos", "neg"] * 2
    assert made.objective() == Hinge()
    inlay.attach(model, LoRA(r=4))
    done = fit(model, made, *data, recipe=Recipe(steps=50, batch_size=4, learning_rate=0.01))
    assert done.losses[0] > 0.5
    assert done.losses[-1] == 0  # a hinge is satisfied, where a cross-entropy never is
    assert made.scores(model, data[0]).argmax(-1).tolist() == [1, 0, 1, 0]
    assert fit(model, made, *data, recipe=Recipe(steps=1), objective=CrossEntropy()).losses[0] > 0


def test_words_without_any_probability_end_too(tokenizer: PreTrainedTokenizerFast) -> None:
    logits = torch.full((len(tokenizer),), -torch.inf)
    logits[tokenizer.convert_tokens_to_ids("good")] = 0.0
    found = scorer(tokenizer, {"a": "good good", "b": "bad film no"}).scores(toys.everywhere(logits), rows())
    assert torch.equal(found[:, 0], torch.zeros(len(rows())))
    assert (found[:, 1] < -1e29).all()


def test_its_description_is_the_same_scorer(bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    made = scorer(tokenizer, decode="ltr", demonstration_tokens=4)
    again = scorer_from_dict(made.to_dict(), tokenizer)
    assert isinstance(again, MultiMaskScorer)
    assert again.to_dict() == made.to_dict()
    assert torch.equal(again.scores(bert, rows()), made.scores(bert, rows()))
    assert made.scores(bert, []).shape == (0, 5)


def test_demonstrations_are_read_before_the_masks_are_filled(
    bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = scorer(tokenizer)
    shown = [[({"text": "maybe"}, "c")] for _ in rows()]
    assert "bad news" in tokenizer.decode(made.encode(rows(), shown)[0].ids)
    assert not torch.allclose(made.scores(bert, rows(), demonstrations=shown), made.scores(bert, rows()))


def test_a_system_solves_a_problem_with_it(bert_folder: Path, tmp_path: Path) -> None:
    problem = Problem(
        base=Base(str(bert_folder), device="cpu"),
        labels=("neg", "pos"),
        train=Labelled(rows=[{"text": "good"}, {"text": "bad"}], labels=["pos", "neg"]),
        templates=(Template("{text} is {mask*}"), Template("{text} is {mask}")),
        verbalizer=Verbalizer({"neg": "no", "pos": "yes"}),
        text=Template("{text}"),
        methods=(LoRA(r=2),),
        recipe=Recipe(steps=2),
    )
    longer = problem.verbalizer.remapped({"neg": "not at all"})
    made = problem.mask_scorer(problem.templates[0], longer, decode="ltr")
    assert isinstance(made, MultiMaskScorer)
    assert (made.width, made.decode) == (5, "ltr")
    solution = Prompt().solve(problem, Stages(tmp_path))
    assert [type(predictor.scorer) for predictor in solution.predictors] == [MultiMaskScorer, MaskScorer]
    scores = solution.scores(problem.base, problem.train.rows)
    again = Solution.from_dict(solution.to_dict(tmp_path), tmp_path, problem.base)
    assert torch.equal(again.scores(problem.base, problem.train.rows), scores)
    assert set(json.loads((tmp_path / "pattern-0" / "stage.json").read_text())["losses"]) != {0.0}


def test_what_cannot_be_asked_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="says how many masks"):
        scorer(tokenizer, source="{text} {mask*2}")
    with pytest.raises(ConfigError, match="did you mean 'max_first'"):
        scorer(tokenizer, decode="max-first")
    with pytest.raises(ConfigError, match="restrict=True is for masks read in one pass"):
        scorer(tokenizer, restrict=True)
    with pytest.raises(ConfigError, match="does not know the word"):
        scorer(tokenizer, {"a": "好", "b": "good"})
