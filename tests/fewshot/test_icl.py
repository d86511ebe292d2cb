"""In-context learning: what is shown, what it changes, and what it costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot.writers import WORDS, Copying, gpt2, held, llama, t5, whole_words
from torch.nn import functional

import inlay
from inlay.errors import CheckpointError, ConfigError, DataError
from inlay.fewshot.base import Base
from inlay.fewshot.flops import cost
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.forms import asked, form_of
from inlay.fewshot.stages import Stages
from inlay.fewshot.systems import system_class
from inlay.fewshot.systems.icl import ICL
from inlay.fewshot.systems.prompt import Prompt

LABELS = ("neg", "pos")
TRAIN = Labelled(
    rows=[{"text": text, "other": 1} for text in ("a", "b", "c", "d", "e", "plot")],
    labels=["neg", "pos", "neg", "pos", "pos", "pos"],
)
ROWS = [{"text": text} for text in ("a b c", "movie", "film plot d")]


@pytest.fixture(scope="module", params=["bert", "gpt2", "llama", "t5"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bert_folder: Path) -> Base:
    """A tiny random model of each form."""
    if request.param == "bert":
        return Base(str(bert_folder))
    folder = tmp_path_factory.mktemp("models") / request.param
    {"gpt2": gpt2, "llama": llama, "t5": t5}[request.param](len(WORDS)).save_pretrained(folder)
    whole_words(["$A", "</s>"] if request.param == "t5" else ["<s>", "$A"]).save_pretrained(folder)
    return Base(str(folder))


def problem(base: Base, **changes: Any) -> Problem:
    given: dict[str, Any] = {
        "base": base, "labels": LABELS, "train": TRAIN, "templates": (Template("{text} was {mask}."),),
        "verbalizer": Verbalizer({"neg": "bad", "pos": "good"}), "text": Template("{text}"), "methods": (),
        "recipe": Recipe(), "unlabelled": ROWS, "max_length": 64,
    }  # fmt: skip
    return Problem(**{**given, **changes})


def test_without_demonstrations_it_is_zero_shot(base: Base, tmp_path: Path) -> None:
    made = problem(base)
    found = ICL(k=0).solve(made, Stages(tmp_path)).scores(base, ROWS)
    assert torch.equal(found, Predictor(scorer=asked(made, made.templates[0])).scores(base, ROWS))
    shown = ICL(k=1).solve(made, Stages(tmp_path)).scores(base, ROWS)
    assert (found - shown).abs().max() > 1e-4, "demonstrations are read"


@pytest.mark.parametrize("calibration", [None, "contextual", "batch"])
def test_a_solution_answers_the_same_when_it_is_read_again(calibration: Any, base: Base, tmp_path: Path) -> None:
    made = problem(base, templates=(Template("{text} was {mask}."), Template("the {text} is {mask}."))[:1])
    solution = ICL(k=1, sets=3, calibration=calibration).solve(made, Stages(tmp_path / "stages"))
    again = Solution.from_dict(solution.to_dict(tmp_path), tmp_path, base)
    torch.testing.assert_close(again.scores(base, ROWS), solution.scores(base, ROWS))
    resumed = ICL(k=1, sets=3, calibration=calibration).solve(made, Stages(tmp_path / "stages"))
    assert torch.equal(resumed.scores(base, ROWS), solution.scores(base, ROWS))


def test_a_calibration_by_other_texts_is_not_taken(tmp_path: Path) -> None:
    base, stages = held(gpt2(len(WORDS)), whole_words(["<s>", "$A"]), tmp_path), Stages(tmp_path / "stages")
    made = problem(base)
    ICL(k=1, calibration="batch").solve(made, stages)
    shown = dataclasses.replace(TRAIN, rows=[{"text": "e"} for _ in TRAIN.rows])
    for changed in ({"unlabelled": [{"text": "b"}] * len(ROWS)}, {"train": shown}):
        with pytest.raises(CheckpointError, match="made with another texts"):
            ICL(k=1, calibration="batch").solve(dataclasses.replace(made, **changed), stages)


def test_several_sets_are_averaged(base: Base, tmp_path: Path) -> None:
    solution = ICL(k=1, sets=3).solve(problem(base), Stages(tmp_path))
    (predictor,) = solution.predictors
    assert len(predictor.demonstrations) == 3
    each = [dataclasses.replace(predictor, demonstrations=[one]).scores(base, ROWS) for one in predictor.demonstrations]
    torch.testing.assert_close(solution.scores(base, ROWS), torch.stack(each).mean(0))


def test_the_rows_shown_are_those_asked_for_and_depend_on_the_seed_alone() -> None:
    def labels(system: ICL, seed: int = 0) -> list[list[str]]:
        return [[TRAIN.labels[index] for index in one] for one in system.drawn(TRAIN, LABELS, seed)]

    assert [sorted(one) for one in labels(ICL(k=2, sets=4))] == [["neg", "neg", "pos", "pos"]] * 4
    assert [sorted(one) for one in labels(ICL(k=4, per="total"))] == [["neg", "neg", "pos", "pos"]]
    counts = {tuple(sorted(one)).count("neg") for one in labels(ICL(k=4, per="total", balanced=False, sets=20))}
    assert len(counts) > 1, "as they are drawn"
    assert labels(ICL(order="label"))[0] == ["neg", "neg", *["pos"] * 4]
    assert ICL(k=0).drawn(TRAIN, LABELS, 0) == []
    first, other = (ICL(k=2, sets=2).drawn(TRAIN, LABELS, seed) for seed in (0, 5))
    assert first == ICL(k=2, sets=2).drawn(TRAIN, LABELS, 0)
    assert first != other
    assert all(len(set(one)) == len(one) for one in first), "without replacement"
    for system in (ICL(k=3), ICL(k=7, per="total")):
        with pytest.raises(ConfigError, match="are to be shown"):
            system.drawn(TRAIN, LABELS, 0)


def test_a_model_that_copies_says_what_the_demonstrations_say(tmp_path: Path) -> None:
    """And the other label when the demonstrations' labels are exchanged."""
    words = whole_words(["<s>", "$A"])
    base = held(Copying(), words, tmp_path)
    rows = [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    train = Labelled(rows=rows, labels=["neg", "pos", "pos"])
    for labels in (train.labels, ["pos", "neg", "neg"]):
        given = problem(base, train=Labelled(rows=rows, labels=labels), templates=(Template("{text} It was {mask}."),))
        found = ICL().solve(given, Stages(tmp_path / str(labels))).scores(base, rows)
        assert [LABELS[index] for index in found.argmax(-1)] == labels
        torch.testing.assert_close(found.max(-1).values - found.min(-1).values, torch.full((3,), 5.0))


def test_an_answer_costs_as_many_operations_as_its_products_have(tmp_path: Path) -> None:
    """Llama, one token to choose: 2 · (weights of a layer) for each token, attention's two products, the head once."""
    folder = tmp_path / "llama"
    llama(len(WORDS)).save_pretrained(folder)
    whole_words(["<s>", "$A"]).save_pretrained(folder)
    base = Base(str(folder), device="cpu")
    given = problem(base)
    hidden, layers, inner, heads, of_keys = 16, 2, 24, 4, 2
    weights = hidden * hidden * (2 + 2 * of_keys / heads) + 3 * hidden * inner
    for system in (ICL(k=0), ICL(k=2), ICL(k=1, sets=2)):
        solution = system.solve(given, Stages(tmp_path))
        found = cost(solution, base, ROWS)
        expected = 0.0
        for shown in solution.predictors[0].demonstrations or [()]:
            for row in solution.predictors[0].scorer.encode(ROWS, [shown] * len(ROWS)):
                expected += 2 * layers * (weights * len(row) + 2 * hidden * len(row) ** 2) + 2 * hidden * len(WORDS)
        # rotary angles are one more small product: places times half a head's width
        assert found.flops == pytest.approx(expected / len(ROWS), rel=0.01)
        assert found.rows == len(ROWS)
    with pytest.raises(DataError, match="at least one"):
        cost(solution, base, [])


def test_the_form_is_read_off_the_config(base: Base) -> None:
    kind = Path(base.source).name
    assert form_of(base) == {"bert": "masked-lm", "t5": "seq2seq"}.get(kind, "causal-lm")


def test_what_cannot_be_is_said_before_anything_is_read(base: Base) -> None:
    assert system_class("icl") is ICL
    for fields, message in (({"k": -1}, "at least 0"), ({"sets": 0}, "at least 1"), ({"order": "best"}, "random")):
        with pytest.raises(ConfigError, match=message):
            ICL(**fields)  # type: ignore[arg-type]
    ICL().check(problem(base))
    if form_of(base) == "masked-lm":
        for system in (ICL(direction="pmi"), ICL(length_norm=0.0)):
            with pytest.raises(ConfigError, match="models that write"):
                system.check(problem(base))


def test_prompt_trains_every_form_of_model(base: Base, tmp_path: Path) -> None:
    """The mask's filler where there is a mask, the choice among the words where the model writes."""
    made = problem(base, methods=(inlay.LoRA(r=2, targets="all-linear"),), recipe=Recipe(steps=20, learning_rate=1e-2))
    before = Predictor(scorer=asked(made, made.templates[0])).scores(base, TRAIN.rows)
    after = Prompt().solve(made, Stages(tmp_path)).scores(base, TRAIN.rows)
    right = torch.tensor([LABELS.index(label) for label in TRAIN.labels])
    assert functional.cross_entropy(after, right) < functional.cross_entropy(before, right)
