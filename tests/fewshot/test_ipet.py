"""iPET: how its generations grow, who labels whose rows, and that a label nobody predicts is an error, not a hang."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot.pattern_problem import PATTERNS, files, rows, small_problem, solved, stopped_everywhere
from torch import Tensor

from inlay.errors import ConfigError, DataError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.annotation import soft_labels
from inlay.fewshot.learning.pattern_ensemble import PatternEnsemble
from inlay.fewshot.learning.seeds import derived
from inlay.fewshot.predictor import Predictor
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.scorers.head import HeadScorer
from inlay.fewshot.stages import Stages
from inlay.fewshot.systems import system_class
from inlay.fewshot.systems.ipet import IPET

NOTHING = Labelled(rows=[], labels=[])


@pytest.fixture(scope="module")
def base(bert_folder: Path) -> Base:
    return Base(str(bert_folder), device="cpu")


def said(seed: int, count: int = 60) -> Tensor:
    """What a model might say about the unlabelled rows."""
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def planted(monkeypatch: pytest.MonkeyPatch, scores: Sequence[Tensor]) -> None:
    """Let the members of every generation say this about the unlabelled rows, in their order."""
    monkeypatch.setattr(PatternEnsemble, "scores", lambda *_: list(scores))


def centred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take each label's mean off what the members say, so that models of four steps give both labels to some rows."""
    asked = PatternEnsemble.scores
    monkeypatch.setattr(PatternEnsemble, "scores", lambda *given: [own - own.mean(0) for own in asked(*given)])


def watched(monkeypatch: pytest.MonkeyPatch) -> list[list[Labelled]]:
    """The rows that each generation's members are trained on; they are not trained."""
    seen: list[list[Labelled]] = []

    def untrained(self: PatternEnsemble, stages: Stages, data: Sequence[Labelled], seed: int) -> list[Predictor]:
        seen.append(list(data))
        return [Predictor(scorer=self.scorers[member.pattern]) for member in self.members]

    monkeypatch.setattr(PatternEnsemble, "trained", untrained)
    return seen


def numbers(problem: Problem, data: Labelled) -> list[int]:
    """The unlabelled rows in a training set, by their numbers."""
    places = {id(row): number for number, row in enumerate(problem.unlabelled)}
    return [places[id(row)] for row in data.rows[len(problem.train) :]]


def test_found_by_name_with_the_papers_numbers() -> None:
    assert system_class("ipet") is IPET
    system = IPET()
    assert (system.generations, system.grow, system.share, system.start) == (3, 5.0, 0.25, 100)


@pytest.mark.parametrize("grow", [2.0, 1.5, 3.0])
def test_generations_grow_with_the_labels_in_proportion(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grow: float
) -> None:
    """N dᵍ rows, the true ones first; of each label as many times more; none twice; hard labels by the maximum."""
    train = Labelled(rows=rows(6).rows, labels=["neg", "pos", "pos", "pos", "neg", "pos"])
    problem = small_problem(base, train=train, unlabelled=rows(200, seed=1).rows)
    scores = [said(member, 200) for member in range(4)]
    seen = watched(monkeypatch)
    planted(monkeypatch, scores)
    solved(IPET(repetitions=2, generations=3, grow=grow, share=1, distil=False, weights="uniform"), problem, tmp_path)
    assert len(seen) == 3
    for generation, members in enumerate(seen):
        for own, data in enumerate(members):
            assert [data.labels.count(label) for label in problem.labels] == [
                round(2 * grow**generation), round(4 * grow**generation)
            ]  # fmt: skip
            assert (data.rows[:6], data.labels[:6]) == (train.rows, train.labels)
            drawn = numbers(problem, data)
            assert len(set(drawn)) == len(drawn)
            others = soft_labels([scores[other] for other in range(4) if other != own]).argmax(-1)
            assert [problem.labels[int(others[row])] for row in drawn] == data.labels[6:]
    assert len({tuple(numbers(problem, data)) for data in seen[1]}) == 4, "each member has rows of its own"


def test_no_model_has_a_say_in_its_own_rows(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, system = small_problem(base), IPET(repetitions=2, generations=2, grow=2, share=1, distil=False)
    seen = watched(monkeypatch)
    scores = [said(member) for member in range(4)]
    planted(monkeypatch, scores)
    solved(system, problem, tmp_path / "one")
    for own in range(4):
        planted(monkeypatch, [-said(99) if member == own else scores[member] for member in range(4)])
        solved(system, problem, tmp_path / str(own))
        for member in range(4):
            same = numbers(problem, seen[-1][member]) == numbers(problem, seen[1][member])
            assert same == (member == own)


def test_the_same_rows_whatever_the_order_of_the_patterns(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = small_problem(base, templates=tuple(map(Template, (*PATTERNS, "{text} really {mask}"))))
    order = [2, 0, 1]
    other = dataclasses.replace(one, templates=tuple(one.templates[place] for place in order))
    system = IPET(repetitions=1, generations=2, grow=2, share=0.5, distil=False, weights="uniform")
    scores, seen = [said(member) for member in range(3)], watched(monkeypatch)
    for name, problem, own in (("one", one, [0, 1, 2]), ("other", other, order)):
        planted(monkeypatch, [scores[place] for place in own])
        solved(system, problem, tmp_path / name)
    for place, member in enumerate(order):
        assert numbers(other, seen[3][place]) == numbers(one, seen[1][member])


def test_seeds_come_from_the_runs_seed(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    planted(monkeypatch, [said(member) for member in range(2)])
    system = IPET(repetitions=1, generations=2, grow=2, distil=False)
    drawn = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        problem = small_problem(base, seed=seed)
        solved(system, problem, tmp_path / name)
        drawn[name] = [numbers(problem, data) for data in seen[-1]]
    assert drawn["a"] == drawn["b"] != drawn["c"]


def test_a_label_that_nobody_predicts_is_an_error_at_once(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = small_problem(base)
    watched(monkeypatch)
    planted(monkeypatch, [torch.tensor([[5.0, 0.0]]).expand(60, 2)] * 2)
    with pytest.raises(DataError, match=r"3 rows of the label 'pos' .* to 0 of 60 unlabelled rows"):
        solved(IPET(repetitions=1, grow=2, distil=False), problem, tmp_path)


def test_every_generation_starts_from_the_pretrained_weights(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of the second generation is what its rows and seed alone make of the base."""
    centred(monkeypatch)
    problem = small_problem(base)
    system = IPET(repetitions=1, generations=2, grow=2, final={"steps": 3}, auxiliary=0)
    solution = solved(system, problem, tmp_path / "run")
    assert isinstance(solution.predictors[0].scorer, HeadScorer)
    data = system.grown(
        system.patterns(problem), Stages(tmp_path / "run" / "generation-1"),
        [Predictor(scorer=problem.mask_scorer(template)) for template in problem.templates],
        system.patterns(problem).weights(Stages(tmp_path / "run")), system.counts(problem, 1), derived(problem.seed, 1),
    )  # fmt: skip
    system.patterns(problem).trained(Stages(tmp_path / "alone"), data, derived(problem.seed, 2))
    run, alone = files(tmp_path / "run" / "generation-2"), files(tmp_path / "alone")
    assert len(alone) == 2
    assert all(run[name] == digest for name, digest in alone.items())
    first = files(tmp_path / "run" / "generation-1")
    assert not {first[name] for name in alone} & set(alone.values())
    notes = Stages(tmp_path / "run").notes()
    assert [notes[f"generation-{g}/pattern-0-repetition-0"]["rows"] for g in (1, 2)] == [6, 12]
    assert notes["generation-2/classifier"]["rows"] == 60


def test_without_labelled_rows_the_likeliest_of_each_label_start(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, seen = small_problem(base, train=NOTHING), watched(monkeypatch)
    planted(monkeypatch, [said(member) for member in range(2)])
    solved(IPET(repetitions=1, generations=2, grow=2, start=7, distil=False), problem, tmp_path)
    asked = [
        Predictor(scorer=problem.mask_scorer(template)).scores(base, problem.unlabelled)
        for template in problem.templates
    ]
    probabilities = soft_labels(asked)
    for data in seen[0]:
        for label, name in enumerate(problem.labels):
            chosen = [row for row, own in zip(numbers(problem, data), data.labels, strict=True) if own == name]
            left = [row for row in range(60) if row not in chosen]
            assert len(chosen) == 7
            assert probabilities[chosen, label].min() >= probabilities[left, label].max()
    assert [seen[1][0].labels.count(label) for label in problem.labels] == [14, 14]


def test_a_run_taken_up_is_the_same_run(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    centred(monkeypatch)
    system = IPET(repetitions=1, generations=2, grow=2, start=5, final={"steps": 3}, auxiliary=1e-3, ratio=1)
    fast = functools.partial(small_problem, base)
    for name, train in (("labelled", rows(6)), ("none", NOTHING)):
        solved(system, fast(train=train), tmp_path / name)
        stops = stopped_everywhere(system, functools.partial(fast, train=train), tmp_path / f"{name}-stopped")
        assert stops >= 4
        assert files(tmp_path / name) == files(tmp_path / f"{name}-stopped")


def test_what_is_missing_is_said_before_anything_is_trained(base: Base, tmp_path: Path) -> None:
    one = (Template(PATTERNS[0]),)
    cases: list[tuple[IPET, dict[str, Any], str]] = [
        (IPET(), {}, "need 144 unlabelled rows, and there are 60"),
        (IPET(), {"train": NOTHING}, "need 5000 unlabelled rows"),
        (IPET(generations=1), {"train": NOTHING}, "need 100 unlabelled rows"),
        (IPET(repetitions=1), {"templates": one}, "two|there is one"),
        (IPET(), {"unlabelled": []}, "there are none"),
    ]
    for system, changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            solved(system, small_problem(base, **changes), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("field", "value"), [("generations", 0), ("start", 0), ("grow", 0.5), ("share", 0)])
def test_settings_that_cannot_be_meant(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        IPET(**{field: value})  # type: ignore[arg-type]
