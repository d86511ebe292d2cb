"""Content analysis: a head of the labels' words is the whole head at those words, small, and exchanged for new ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot import toys
from torch import nn
from transformers import (
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

import inlay
from inlay.errors import ConfigError, UnsupportedError
from inlay.fewshot.base import Base
from inlay.fewshot.explaining import explained
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.methods.restricted_head import RestrictedHead, restricted_to
from inlay.fewshot.predictor import Predictor
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.head_rows import head_rows
from inlay.fewshot.scorers.kinds import scorer_from_dict
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.fewshot.splits import few_shot_split
from inlay.fewshot.stages import Stages
from inlay.fewshot.systems import system_class
from inlay.fewshot.systems.content import Content

TEMPLATE = "{text} It is {mask*2} ."
WORDS = {"pro": "good news", "con": ["bad news", "awful film"], "none": "nothing ever"}
ROWS = [{"text": text} for text in ("a good film", "bad film", "great movie", "the world", "terrible", "fine")]
LABELS = ["pro", "con", "pro", "none", "con", "none"]


def scorer_of(tokenizer: PreTrainedTokenizerFast, restrict: bool, words: Any = None) -> MaskScorer:
    return MaskScorer(
        tokenizer=tokenizer, template=Template(TEMPLATE), verbalizer=Verbalizer(words or WORDS), restrict=restrict
    )


def models(vocabulary: int) -> list[nn.Module]:
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            toys.tiny_bert(vocabulary),
            RobertaForMaskedLM(RobertaConfig(vocab_size=vocabulary, intermediate_size=16, pad_token_id=0, **shape)),
            DistilBertForMaskedLM(DistilBertConfig(vocab_size=vocabulary, dim=16, n_layers=1, n_heads=2)),
            ElectraForMaskedLM(ElectraConfig(vocab_size=vocabulary, embedding_size=8, intermediate_size=16, **shape)),
        ]


@pytest.mark.parametrize("index", range(4))
def test_only_the_words_rows_are_computed_and_the_scores_are_the_whole_heads(
    tokenizer: PreTrainedTokenizerFast, index: int
) -> None:
    model: Any = models(len(tokenizer))[index].eval()
    whole, narrow = (scorer_of(tokenizer, restrict) for restrict in (False, True))
    assert len(narrow.tokens) == 7  # good bad news awful film nothing ever
    assert torch.allclose(narrow.scores(model, ROWS), whole.scores(model, ROWS), atol=1e-5)
    widths: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *args: widths.append(args[2].shape[-1]))
    narrow.scores(model, ROWS)
    whole.scores(model, ROWS)
    hook.remove()
    assert widths == [7, len(tokenizer)]
    assert "forward" not in vars(model.get_output_embeddings())

    before = whole.scores(model, ROWS)
    inlay.attach(model, RestrictedHead(token_ids=narrow.tokens))
    for scorer in (whole, narrow):  # a model with a restricted head is asked in columns, whatever the scorer says
        assert torch.allclose(scorer.scores(model, ROWS), before, atol=1e-5)
    assert restricted_to(model) == narrow.tokens
    width = model.get_output_embeddings().in_features
    assert inlay.summary(model).trainable_parameters == 7 * (width + 1)


def test_gradients_are_the_whole_heads(bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    found = []
    for restrict in (False, True):
        scorer = scorer_of(tokenizer, restrict)
        bert.zero_grad()
        scorer(bert, scorer.collate(scorer.encode(ROWS))).logsumexp(-1).sum().backward()
        found.append({name: p.grad.clone() for name, p in bert.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


def test_pieces_around_the_head_are_left_to_compute(bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    narrow, whole = scorer_of(tokenizer, True), scorer_of(tokenizer, False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inlay.attach(bert, inlay.LoRA(r=2, targets="decoder"))
        for name, parameter in bert.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
    with head_rows(bert, torch.tensor([3, 5])) as narrowed:
        assert not narrowed
    assert torch.equal(narrow.scores(bert, ROWS), whole.scores(bert, ROWS))
    inlay.detach(bert)
    inlay.attach(bert, inlay.PartialFineTuning(targets="decoder"))  # a copy of the matrix: its rows are chosen
    bert.get_output_embeddings().inlays.default["freezing_bias"].value.data.normal_()
    with head_rows(bert, torch.tensor([3, 5])) as narrowed:
        assert narrowed
    assert torch.allclose(narrow.scores(bert, ROWS), whole.scores(bert, ROWS), atol=1e-5)


def test_an_adapter_for_other_words_is_refused(bert: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    inlay.attach(bert, RestrictedHead(token_ids=scorer_of(tokenizer, True).tokens))
    other = scorer_of(tokenizer, True, {"pro": "good sports", "con": "bad sports"})
    with pytest.raises(ConfigError, match="restricted head has no sports"):
        other.scores(bert, ROWS)
    inlay.detach(bert)
    with pytest.raises(UnsupportedError, match="no output matrix"):
        inlay.attach(bert.bert, RestrictedHead(token_ids=(1,)))
    with pytest.raises(ConfigError, match="there is no token 9999"):
        inlay.attach(bert, RestrictedHead(token_ids=(9999,)))
    with pytest.raises(ConfigError, match="each once"):
        RestrictedHead(token_ids=(1, 1))


def test_the_scorers_description_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    for restrict in (False, True):
        made = scorer_of(tokenizer, restrict)
        again = scorer_from_dict(made.to_dict(), tokenizer)
        assert isinstance(again, MaskScorer)
        assert again.restrict is restrict


@pytest.fixture
def problem(bert_folder: Path) -> Problem:
    return Problem(
        base=Base(str(bert_folder), device="cpu"),
        labels=tuple(WORDS),
        train=Labelled(rows=ROWS, labels=LABELS),
        templates=(Template(TEMPLATE),),
        verbalizer=Verbalizer(WORDS),
        text=Template("{text}"),
        methods=(inlay.Adapter(reduction_factor=8),),
        recipe=Recipe(steps=4, batch_size=3, learning_rate=0.02),
    )


def test_the_adapter_and_its_head_are_saved_and_small(problem: Problem, tmp_path: Path) -> None:
    solution = Content().solve(problem, Stages(tmp_path))
    place = tmp_path / "pattern-0"
    tokens, width, m = 7, 32, 4
    count = 2 * (2 * width * m + m + width) + tokens * (width + 1)
    assert Stages(tmp_path).notes()["pattern-0"]["trainable_parameters"] == count
    size = sum(path.stat().st_size for path in place.rglob("*.safetensors"))
    assert count * 4 <= size < count * 4 + 8000  # single precision, and the names
    again = Predictor.from_dict(solution.predictors[0].to_dict(tmp_path), tmp_path, problem.base)
    scores = again.scores(problem.base, ROWS)
    assert torch.equal(scores, solution.scores(problem.base, ROWS))
    untrained = Predictor(scorer=problem.mask_scorer(problem.templates[0])).scores(problem.base, ROWS)
    assert not torch.allclose(scores, untrained, atol=1e-2)
    assert system_class("content") is Content


def test_an_explanation_names_the_words_of_the_small_head(
    problem: Problem, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    one = dataclasses.replace(
        problem, templates=(Template("{text} It is {mask} ."),),
        verbalizer=Verbalizer({"pro": "good", "con": "bad", "none": "nothing"}),
    )  # fmt: skip
    for head in (True, False):
        solution = Content(head=head).solve(one, Stages(tmp_path / str(head)))
        (found,) = explained(one.base, solution, ROWS[:1], top=len(tokenizer))
        said = dict(found.words[0])
        assert set(said) >= {"good", "bad", "nothing"}
        assert (set(said) == {"good", "bad", "nothing"}) is head
        whole = said["good"] + said["bad"] + said["nothing"]
        shares = {label: said[word] / whole for label, word in (("pro", "good"), ("con", "bad"), ("none", "nothing"))}
        assert shares == pytest.approx(found.scores, abs=1e-5)


def test_a_near_domain_start_keeps_the_body_and_swaps_the_head(problem: Problem, tmp_path: Path) -> None:
    Content().solve(problem, Stages(tmp_path / "near"))
    start = tmp_path / "near" / "pattern-0" / "adapter"
    words = {"pro": "good world", "con": "bad world"}
    frozen = Recipe(steps=0)
    here = dataclasses.replace(
        problem, labels=("pro", "con"), verbalizer=Verbalizer(words), recipe=frozen,
        train=Labelled(rows=ROWS[:2], labels=LABELS[:2]),
    )  # fmt: skip
    found = Content(start=str(start)).solve(here, Stages(tmp_path / "here")).scores(here.base, ROWS)
    with here.base.adapted("masked-lm", [*here.methods], seed=0, start=start) as model:
        scorer = here.mask_scorer(here.templates[0])
        expected = scorer.scores(model, ROWS)  # the near domain's body under the base's own head
    assert torch.allclose(found, expected, atol=1e-5)
    cold = Content().solve(here, Stages(tmp_path / "cold")).scores(here.base, ROWS)
    assert not torch.allclose(found, cold, atol=1e-2)
    same = dataclasses.replace(problem, recipe=frozen)  # the same words: head and all
    kept = Content(start=str(start)).solve(same, Stages(tmp_path / "same")).scores(problem.base, ROWS)
    near = Predictor(scorer=Content().scorer(problem, problem.templates[0]), adapter=start)
    assert torch.equal(kept, near.scores(problem.base, ROWS))


def test_a_start_that_does_not_fit(problem: Problem, tmp_path: Path) -> None:
    Content().solve(problem, Stages(tmp_path / "near"))
    start = tmp_path / "near" / "pattern-0" / "adapter"
    for method, message in ((inlay.LoRA(r=2), "has no lora at"), (inlay.Adapter(reduction_factor=4), "cannot start")):
        other = dataclasses.replace(problem, methods=(method,))
        with pytest.raises(ConfigError, match=message):
            Content(start=str(start)).solve(other, Stages(tmp_path / "bad"))
        assert not hasattr(problem.base.model("masked-lm").bert, "inlays")
    with pytest.raises(ConfigError, match="there is no adapter there"):
        Content(start=str(tmp_path / "nowhere")).check(problem)
    with pytest.raises(ConfigError, match="how many there are"):
        Content().check(dataclasses.replace(problem, templates=(Template("{text} {mask*}"),)))


def test_without_a_trained_head_the_words_are_the_models(problem: Problem, tmp_path: Path) -> None:
    solution = Content(head=False).solve(problem, Stages(tmp_path))
    count = 2 * (2 * 32 * 4 + 4 + 32)
    assert Stages(tmp_path).notes()["pattern-0"]["trainable_parameters"] == count
    whole = Predictor(scorer=problem.mask_scorer(problem.templates[0]), adapter=solution.predictors[0].adapter)
    assert torch.allclose(solution.scores(problem.base, ROWS), whole.scores(problem.base, ROWS), atol=1e-5)


def test_speakers_stay_on_one_side() -> None:
    speakers = [f"s{number % 9}" for number in range(90)]
    split = few_shot_split([LABELS[number % 3] for number in range(90)], 3, dev="same", groups=speakers, seed=4)
    assert not {speakers[i] for i in split.train} & {speakers[i] for i in split.dev}
