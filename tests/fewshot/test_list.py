"""LiST: sessions are stages, students begin anew, the labelled rows come after, and the base is never written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot import toys
from safetensors.torch import load_file
from transformers import (
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import inlay
from inlay.engine.registry import make_method
from inlay.errors import ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.learning.language_head import language_head
from inlay.fewshot.predictor import Predictor
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.stages import Stages
from inlay.fewshot.systems import system_class
from inlay.fewshot.systems.list import LiST

ROWS = [{"text": text} for text in ("a good film", "bad film", "great movie", "terrible news")]
UNLABELLED = [{"text": text} for text in ("good", "awful world", "the movie was fine", "bad bad", "wonderful", "no")]
SMALL: dict[str, Any] = {"student": {"steps": 5, "batch_size": 3}, "epochs": 2, "labelled": 2}


@pytest.fixture
def problem(bert_folder: Path) -> Problem:
    methods = [make_method(entry["kind"], {k: v for k, v in entry.items() if k != "kind"}) for entry in LiST.peft]
    return Problem(
        base=Base(str(bert_folder), device="cpu"),
        labels=("neg", "pos"),
        train=Labelled(rows=ROWS, labels=["pos", "neg", "pos", "neg"]),
        templates=(Template("{text} It was {mask}."),),
        verbalizer=Verbalizer({"neg": "bad", "pos": "good"}),
        text=Template("{text}"),
        methods=tuple(methods),
        recipe=Recipe(steps=6, batch_size=2, learning_rate=5e-3),
        unlabelled=UNLABELLED,
        seed=3,
    )


def scores(problem: Problem, folder: Path, name: str) -> torch.Tensor:
    """What the adapter of a finished stage says about the unlabelled rows."""
    scorer = problem.mask_scorer(problem.templates[0])
    return Predictor(scorer=scorer, adapter=folder / name / "adapter").scores(problem.base, UNLABELLED)


def test_sessions_are_stages_and_a_stopped_run_is_the_same_run(problem: Problem, tmp_path: Path) -> None:
    system = LiST(sessions=2, **SMALL)
    before = {name: tensor.clone() for name, tensor in problem.base.model("masked-lm").state_dict().items()}
    whole = system.solve(problem, Stages(tmp_path / "a")).scores(problem.base, UNLABELLED)
    assert sorted(Stages(tmp_path / "a").notes()) == [
        "pattern-0/session-1/pseudo-labels",
        "pattern-0/session-1/student",
        "pattern-0/session-1/tuned",
        "pattern-0/session-2/pseudo-labels",
        "pattern-0/session-2/student",
        "pattern-0/session-2/tuned",
        "pattern-0/teacher",
    ]
    after = problem.base.model("masked-lm").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    LiST(sessions=1, **SMALL).solve(problem, Stages(tmp_path / "b"))  # as far as a run that was stopped
    said: list[str] = []
    resumed = system.solve(problem, Stages(tmp_path / "b", said.append)).scores(problem.base, UNLABELLED)
    assert torch.equal(resumed, whole)
    assert len(said) == 3
    assert all("session-2" in line for line in said)
    again: list[str] = []
    system.solve(problem, Stages(tmp_path / "b", again.append))
    assert not again


def test_a_student_begins_as_the_base_and_goes_on_from_itself(problem: Problem, tmp_path: Path) -> None:
    nothing = {**SMALL, "student": {"steps": 0}, "epochs": 0}
    LiST(sessions=1, **nothing).solve(problem, Stages(tmp_path))
    place = tmp_path / "pattern-0"
    base = Predictor(scorer=problem.mask_scorer(problem.templates[0])).scores(problem.base, UNLABELLED)
    student = scores(problem, place, "session-1/student")
    # W_up = 0 and copies of the head: the fresh student is the base, bit for bit, and not its teacher.
    assert torch.equal(student, base)
    assert not torch.allclose(scores(problem, place, "teacher"), student, atol=1e-2)
    assert torch.equal(scores(problem, place, "session-1/tuned"), student)

    LiST(sessions=1, **{**SMALL, "epochs": 0}).solve(problem, Stages(tmp_path / "learnt"))
    place = tmp_path / "learnt" / "pattern-0" / "session-1"
    learnt = scores(problem, place, "student")
    assert not torch.allclose(learnt, base, atol=1e-2)
    assert torch.equal(scores(problem, place.parent, "session-1/tuned"), learnt)


def moved(problem: Problem, folder: Path) -> tuple[float, float]:
    """How far the numbers of a teacher's head, and those of its adapter, are from their beginning at most."""
    begun, learnt = (
        load_file(place / "pattern-0" / "teacher" / "adapter" / "adapter_model.safetensors")
        for place in (folder.parent / "begun", folder)
    )
    far = {name: float((tensor - begun[name]).abs().max()) for name, tensor in learnt.items()}
    head = {name for name in far if ".cls." in name}
    assert head
    assert far.keys() - head
    return max(far[name] for name in head), max(far[name] for name in far.keys() - head)


def test_the_head_has_a_rate_of_its_own(problem: Problem, tmp_path: Path) -> None:
    # AdamW moves a number by about the rate in each of its first steps, and by no more than that and some decay.
    def taught(rates: dict[str, float], **settings: Any) -> tuple[float, float]:
        recipe = dataclasses.replace(problem.recipe, rates=rates, warmup=0.0)
        folder = tmp_path / f"{settings}{rates}"
        LiST(sessions=1, **{**SMALL, **settings}).taught(
            dataclasses.replace(problem, recipe=recipe), Stages(folder / "pattern-0"), scorer
        )
        return moved(problem, folder)

    scorer, still = problem.mask_scorer(problem.templates[0]), dataclasses.replace(problem.recipe, steps=0)
    LiST(sessions=1, **SMALL).taught(
        dataclasses.replace(problem, recipe=still), Stages(tmp_path / "begun" / "pattern-0"), scorer
    )
    bound = 1.2 * problem.recipe.steps
    for rates, settings, rate in (({}, {}, 1e-4), ({}, {"head_rate": 1e-6}, 1e-6), ({"freezing": 1e-5}, {}, 1e-5)):
        head, adapter = taught(rates, **settings)
        assert 0.1 * rate < head < bound * rate
        assert adapter > problem.recipe.learning_rate


def test_what_a_student_learns(problem: Problem) -> None:
    system = LiST(student={"steps": 10}, warmup=0.6, threshold=0.7)
    objective = system.objective(problem)
    assert (objective.uniform_steps, objective.threshold, objective.size) == (6, 0.7, 4)
    assert LiST(student={"steps": 10}, reweight=False).objective(problem).uniform_steps == 10
    assert system.of_student(problem).batch_size == 16
    assert system.of_tuning(problem).steps == 50 * 2  # four rows, two in a step
    assert system_class("list") is LiST


def test_sharper_pseudo_labels(problem: Problem, tmp_path: Path) -> None:
    teacher = problem.trained(Stages(tmp_path), "teacher", problem.mask_scorer(problem.templates[0]))
    plain, sharp = (LiST(temperature=t).pseudo_labels(problem, teacher) for t in (1.0, 0.5))
    assert torch.allclose(sharp, plain**2 / (plain**2).sum(-1, keepdim=True), atol=1e-6)


def test_the_head_but_not_the_vocabulary() -> None:
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = [
        toys.tiny_bert(50, hidden_size=16, num_attention_heads=2),
        RobertaForMaskedLM(RobertaConfig(vocab_size=50, intermediate_size=16, **shape)),
        DistilBertForMaskedLM(DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)),
    ]
    for model in made:
        head = language_head(model)
        assert head is not None
        inlay.attach(model, head)
        # A square transform with its bias, a norm of two vectors, and one bias for each word.
        assert inlay.summary(model).trainable_parameters == 16 * 16 + 16 + 2 * 16 + 50
    untied = BertForMaskedLM(toys.tiny_bert(50).config.__class__(vocab_size=50, tie_word_embeddings=False, **shape))
    head = language_head(untied)
    assert head is not None
    assert not any("decoder[.]weight" in target for target in head.targets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sessions": 0}, "sessions=0"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"temperature": 0}, "temperature=0"),
        ({"student": {"stpes": 3}}, "steps"),
        ({"student": {"steps": -1}}, "steps=-1"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LiST(**settings)


def test_without_unlabelled_rows(problem: Problem, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unlabelled rows"):
        LiST().solve(dataclasses.replace(problem, unlabelled=()), Stages(tmp_path))
