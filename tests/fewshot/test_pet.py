"""PET: what its ensemble weighs, what its classifier learns from, and that a run taken up is the same run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from fewshot.pattern_problem import PATTERNS, files, rows, small_problem, solved, stopped_everywhere

from inlay.errors import ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.annotation import soft_labels
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.learning.objectives import CrossEntropy
from inlay.fewshot.learning.pattern_ensemble import PatternEnsemble
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.problem import Labelled
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.head import HeadScorer
from inlay.fewshot.stages import Stages
from inlay.fewshot.systems import system_class
from inlay.fewshot.systems.pet import PET

FAST = {"repetitions": 2, "final": {"steps": 4, "batch_size": 8}}


@pytest.fixture(scope="module")
def base(bert_folder: Path) -> Base:
    return Base(str(bert_folder), device="cpu")


def test_found_by_name() -> None:
    assert system_class("pet") is PET
    assert dict(PET().final) == {"steps": 1000, "batch_size": 16}
    assert dict(PET(final={"steps": 5}).final) == {"steps": 5, "batch_size": 16}


def test_a_classifier_learns_from_every_pattern_by_way_of_unlabelled_rows(base: Base, tmp_path: Path) -> None:
    problem = small_problem(base)
    before = {name: value.clone() for name, value in base.model("masked-lm").state_dict().items()}
    solution = solved(PET(**FAST), problem, tmp_path)
    assert [type(predictor.scorer) for predictor in solution.predictors] == [HeadScorer]
    notes = Stages(tmp_path).notes()
    assert notes["classifier"]["rows"] == len(problem.unlabelled)
    assert notes["classifier"]["depends"]["recipe"]["steps"] == 4
    assert notes["classifier"]["depends"]["recipe"]["learning_rate"] == problem.recipe.learning_rate
    members = [f"pattern-{pattern}-repetition-{repetition}" for pattern in range(2) for repetition in range(2)]
    assert sorted(name for name, note in notes.items() if note.get("rows") == 6) == members
    assert len({notes[name]["depends"]["seed"] for name in members}) == 4
    assert all(torch.equal(before[name], value) for name, value in base.model("masked-lm").state_dict().items())


def test_the_classifier_learns_what_the_ensemble_says(base: Base, tmp_path: Path) -> None:
    """With all parameters free to move it agrees with its teachers on nearly all rows it was taught."""
    problem = small_problem(base, recipe=dataclasses.replace(small_problem(base).recipe, steps=20))
    system = PET(repetitions=1, auxiliary=0, final={"steps": 80, "batch_size": 16})
    ensemble = solved(dataclasses.replace(system, distil=False), problem, tmp_path)
    classifier = solved(system, problem, tmp_path)
    taught, learned = (one.scores(base, problem.unlabelled).softmax(-1) for one in (ensemble, classifier))
    assert (taught.argmax(-1) == learned.argmax(-1)).float().mean() >= 0.9
    assert 0.1 < (taught.argmax(-1) == 0).float().mean() < 0.9, "there is something to tell apart"


def test_patterns_weigh_what_the_untrained_model_gets_right_with_them(base: Base, tmp_path: Path) -> None:
    problem = small_problem(base, train=rows(20))
    patterns = PatternEnsemble(problem=problem, repetitions=2)
    right = torch.tensor([problem.labels.index(label) for label in problem.train.labels])
    expected = []
    for source in PATTERNS:
        said = Predictor(scorer=problem.mask_scorer(Template(source))).scores(base, problem.train.rows).argmax(-1)
        expected += [(said == right).double().mean().item()] * 2
    assert patterns.weights(Stages(tmp_path)) == tuple(expected)
    assert PatternEnsemble(problem=problem, weighing="uniform").weights(Stages(tmp_path / "other")) == ()
    wrong = Labelled(rows=problem.train.rows[:1], labels=["pos" if said[0] == 0 else "neg"])
    never = small_problem(base, train=wrong, templates=(Template(PATTERNS[1]),))
    assert PatternEnsemble(problem=never).weights(Stages(tmp_path / "never")) == (), "all 0 tell nothing"


def test_the_ensemble_is_the_weighted_mean_whatever_the_order_of_the_patterns(base: Base, tmp_path: Path) -> None:
    """Each pattern's models draw from seeds that its text names: the same models, the same answer up to rounding."""
    system, problem = PET(repetitions=2, distil=False), small_problem(base, train=rows(7))
    turned = dataclasses.replace(problem, templates=problem.templates[::-1])
    one, other = solved(system, problem, tmp_path / "one"), solved(system, turned, tmp_path / "other")
    texts = problem.unlabelled[:20]
    torch.testing.assert_close(one.scores(base, texts), other.scores(base, texts))
    assert one.weights == (*other.weights[2:], *other.weights[:2])
    alone = [Solution(predictors=[predictor]).scores(base, texts) for predictor in one.predictors]
    shares = torch.tensor(one.weights) / sum(one.weights)
    torch.testing.assert_close(one.scores(base, texts), torch.einsum("p,prl->rl", shares, torch.stack(alone)))
    assert all(not torch.equal(alone[0], own) for own in alone[1:])


def test_the_order_of_the_verbalizer_is_not_that_of_the_labels(base: Base, tmp_path: Path) -> None:
    """Scores, weights and targets follow the problem's labels, however the words are listed."""
    words = {"neg": "bad", "pos": "good"}
    one, other = (
        small_problem(
            base, train=rows(5), verbalizer=Verbalizer(dict(items)), templates=(Template(PATTERNS[0]),),
            recipe=Recipe(steps=1, batch_size=2),
        )
        for items in (words.items(), reversed(words.items()))
    )  # fmt: skip
    found = [
        solved(PET(distil=False, repetitions=1, auxiliary=0), problem, tmp_path / name)
        for problem, name in ((one, "one"), (other, "other"))
    ]
    assert found[0].labels == found[1].labels == ("neg", "pos")
    assert found[0].weights == found[1].weights
    assert torch.equal(*(solution.scores(base, one.unlabelled[:5]) for solution in found))
    with pytest.raises(ConfigError, match="the label 'pos' has no word"):
        small_problem(base, verbalizer=Verbalizer({"neg": "bad", "positive": "good"}))


def test_what_the_classifier_is_taught(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, seen = small_problem(base), []
    made = type(problem).trained

    def watched(
        self: object, stages: Stages, name: str, scorer: object, data: object = None, **options: object
    ) -> object:
        seen.append((name, data, options.get("objective")))
        return made(self, stages, name, scorer, data, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(problem), "trained", watched)
    ensemble = solved(PET(**FAST, distil=False, auxiliary=0), problem, tmp_path)
    assert all(isinstance(objective, CrossEntropy) for _, _, objective in seen)
    solved(PET(**FAST, temperature=3.0, auxiliary=0), problem, tmp_path)
    name, (texts, targets), objective = seen[-1]
    assert (name, objective.temperature) == ("classifier", 3.0)
    assert texts == problem.unlabelled
    said = [predictor.scores(base, problem.unlabelled) for predictor in ensemble.predictors]
    torch.testing.assert_close(targets, soft_labels(said, ensemble.weights))


def test_labels_of_several_tokens_are_learned_with_their_scorers_own_objective(base: Base, tmp_path: Path) -> None:
    problem = small_problem(
        base,
        templates=(Template("{text} It was {mask*}"),),
        verbalizer=Verbalizer({"neg": "bad film", "pos": "really good film"}),
    )
    patterns = PatternEnsemble(problem=problem, auxiliary=0)
    assert patterns.objective(patterns.scorers[0]) == patterns.scorers[0].objective() != CrossEntropy()
    solution = solved(PET(repetitions=1, distil=False, ratio=1), problem, tmp_path)
    assert torch.isfinite(solution.scores(base, problem.unlabelled[:3])).all()


def test_patterns_with_soft_slots_are_weighed_trained_and_distilled(base: Base, tmp_path: Path) -> None:
    templates = (Template("{text} {soft:2} {mask}"), Template("{text} {soft:film} {mask}"))
    problem = small_problem(base, templates=templates)
    solution = solved(PET(repetitions=1, ratio=1, final={"steps": 2}), problem, tmp_path)
    members = {"pattern-0-repetition-0", "pattern-1-repetition-0"}
    assert {"weights", *members, "classifier"} <= set(Stages(tmp_path).notes())  # the weights of zero_shot_train
    assert torch.isfinite(solution.scores(base, problem.train.rows)).all()


def test_soft_slots_are_asked_as_they_start(base: Base, tmp_path: Path) -> None:
    problem = small_problem(base, templates=(Template("{text} {soft:film} {mask}"), Template("{text} film {mask}")))
    soft, plain = PatternEnsemble(problem=problem).untrained(problem.train.rows)
    torch.testing.assert_close(soft, plain)  # a slot that starts as a word is that word
    solution = solved(PET(repetitions=1, distil=False), problem, tmp_path)
    assert len(solution.predictors) == 2


def test_a_run_taken_up_is_the_same_run(base: Base, tmp_path: Path) -> None:
    system = PET(**FAST)
    whole = solved(system, small_problem(base), tmp_path / "whole")
    stops = stopped_everywhere(system, lambda: small_problem(base), tmp_path / "stopped")
    assert stops >= 4
    assert files(tmp_path / "whole") == files(tmp_path / "stopped")
    assert len(files(tmp_path / "whole")) > 9
    again = solved(system, small_problem(base), tmp_path / "stopped")
    texts = small_problem(base).unlabelled[:5]
    assert torch.equal(whole.scores(base, texts), again.scores(base, texts))
    solved(system, small_problem(base, seed=6), tmp_path / "other")
    assert not set(files(tmp_path / "other").values()) & {
        digest for name, digest in files(tmp_path / "whole").items() if "adapter" in name
    }


def test_what_is_missing_is_said_before_anything_is_trained(base: Base, tmp_path: Path) -> None:
    cases = [
        (PET(), {"unlabelled": []}, "give --unlabeled FILE"),
        (PET(distil=False), {"unlabelled": []}, "auxiliary=0"),
        (PET(), {"train": Labelled(rows=[], labels=[])}, "ipet can start without any"),
        (PET(), {"templates": (*map(Template, PATTERNS), Template("{text}"))}, "has no {mask}"),
        (PET(), {"text": Template("{text} {mask}")}, "answers without a mask"),
        (PET(), {"verbalizer": Verbalizer({"neg": "bad", "pos": "unheard-of"})}, "unheard-of"),
    ]
    for system, changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            solved(system, small_problem(base, **changes), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    solution = solved(PET(repetitions=1, distil=False, auxiliary=0), small_problem(base, unlabelled=[]), tmp_path)
    assert len(solution.predictors) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("repetitions", 0), ("ratio", 1.5), ("weights", "wmean"), ("auxiliary", 1), ("temperature", 0)],
)
def test_settings_that_cannot_be_meant(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        PET(**{field: value})  # type: ignore[arg-type]


def test_the_final_recipe_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"'step'.*steps"):
        PET(final={"step": 3})
    with pytest.raises(ConfigError, match="steps=-1"):
        PET(final={"steps": -1})
