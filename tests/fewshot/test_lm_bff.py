"""LM-BFF: what is trained is shown demonstrations, what is chosen is chosen on the development rows, all resumable."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fewshot.seq2seq_toys import t5_tokenizer
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from inlay.errors import CheckpointError, ConfigError, DataError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.best_step import BestStep
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.learning.objectives import Interval, Step
from inlay.fewshot.learning.tuning import Tuning, grid_points
from inlay.fewshot.predictor import Solution
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.prompts.demonstrations import Demonstrations
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.searches.ranking import Quality, quality
from inlay.fewshot.stages import Stages
from inlay.fewshot.systems import system_class
from inlay.fewshot.systems.lm_bff import LMBFF
from inlay.methods.lora import LoRA

TEXTS = {"neg": ["bad film", "awful", "a terrible movie"], "pos": ["good film", "great", "a wonderful movie"]}
ROWS = [({"text": text, "idx": str(number)}, label) for label in TEXTS for number, text in enumerate(TEXTS[label])]
TRAIN = Labelled(rows=[row for row, _ in ROWS], labels=[label for _, label in ROWS])
DEV = Labelled(
    rows=[{"text": text} for text in ("bad", "no good", "fine", "great film")], labels=["neg", "neg", "pos", "pos"]
)
QUICK: dict[str, Any] = {"sets": 2, "checks": 2}


@pytest.fixture(scope="module")
def base(bert_folder: Path) -> Base:
    return Base(str(bert_folder), device="cpu")


@pytest.fixture
def problem(base: Base) -> Problem:
    return Problem(
        base=base, labels=("neg", "pos"), train=TRAIN, templates=(Template("{text} It was {mask}."),),
        verbalizer=Verbalizer({"neg": "no", "pos": "yes"}), text=Template("{text}"), methods=(LoRA(r=2),),
        recipe=Recipe(steps=2, batch_size=2, learning_rate=0.01), dev=DEV, seed=3, max_length=60,
    )  # fmt: skip


def test_it_is_found_by_its_name() -> None:
    assert system_class("lm-bff") is LMBFF
    assert (LMBFF.dev, LMBFF().sets, LMBFF().filter) == ("same", 16, 0.5)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_resumed_and_read_again_it_answers_the_same(problem: Problem, tmp_path: Path, share: float) -> None:
    system, said = LMBFF(filter=share, **QUICK), list[str]()
    stages = Stages(tmp_path / "stages", said.append)
    solution = system.solve(problem, stages)
    assert said == ["prompt-0"]
    (predictor,) = solution.predictors
    assert isinstance(predictor.demonstrations, Demonstrations) is (share < 1)
    assert predictor.scorer.max_length == 120
    scores = solution.scores(problem.base, DEV.rows)
    assert torch.equal(system.solve(problem, stages).scores(problem.base, DEV.rows), scores)
    assert said == ["prompt-0"]
    for changed in ({"sets": 3}, {"order": "random"}, {"checks": 1}):
        with pytest.raises(CheckpointError, match=f"another .*{'checks' if 'checks' in changed else 'demonstrations'}"):
            dataclasses.replace(system, **changed).solve(problem, stages)  # type: ignore[arg-type]
    fields = json.loads(json.dumps(solution.to_dict(tmp_path)))
    assert torch.equal(Solution.from_dict(fields, tmp_path, problem.base).scores(problem.base, DEV.rows), scores)
    anew = system.solve(problem, Stages(tmp_path / "again"))
    assert torch.equal(anew.scores(problem.base, DEV.rows), scores)


def test_without_demonstrations_and_development_rows_it_is_plain_prompting(problem: Problem, tmp_path: Path) -> None:
    bare = dataclasses.replace(problem, dev=None, templates=(*problem.templates, Template("It is {mask}: {text}")))
    solution = LMBFF(demonstrations=False).solve(bare, Stages(tmp_path))
    assert [predictor.demonstrations for predictor in solution.predictors] == [(), ()]
    assert solution.predictors[0].scorer.max_length == 60
    plain = system_class("prompt")().solve(bare, Stages(tmp_path / "plain"))
    assert torch.equal(solution.scores(bare.base, DEV.rows), plain.scores(bare.base, DEV.rows))


def test_soft_slots_are_trained_and_chosen_by_the_development_rows(problem: Problem, tmp_path: Path) -> None:
    soft = dataclasses.replace(problem, templates=(Template("{text} {soft:2} It was {mask}."),))
    solution = LMBFF(**QUICK).solve(soft, Stages(tmp_path))
    assert solution.scores(soft.base, DEV.rows).isfinite().all()
    with pytest.raises(ConfigError, match="soft slots: write words in their place"):
        LMBFF(search="labels").check(soft)


def test_a_long_row_is_still_shown_its_demonstrations(problem: Problem) -> None:
    system = LMBFF(**QUICK)
    (prompt,) = system.prompts(Tuning(problem, Stages("unused")))
    scorer = system.scorer(problem, prompt)
    shown = [(row, label) for row, label in zip(TRAIN.rows[2:4], TRAIN.labels[2:4], strict=True)]
    short, long = scorer.encode([{"text": "a film"}, {"text": "a film " * 200}], [shown, shown])
    assert (short.demonstrations, short.cut) == (2, 0)
    assert long.demonstrations == 2
    assert len(long) == 2 * problem.max_length


def test_the_step_that_is_kept_is_the_best(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved adapter has the best quality that was measured while it was trained."""
    from inlay.fewshot.learning import tuning

    seen = list[Quality]()

    class Watched(BestStep):
        def __call__(self, step: int, loss: float) -> None:
            before = self.best
            super().__call__(step, loss)
            seen.append(self.measure() if self.best is before else self.best)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "BestStep", Watched)
    recipe = Recipe(steps=6, batch_size=2, learning_rate=0.3)  # so fast that it does not get better step by step
    tuned = Tuning(dataclasses.replace(problem, recipe=recipe), Stages(tmp_path), checks=6)
    made = tuned.trained("one", problem.mask_scorer(problem.templates[0]))
    best = max(seen[:5])
    assert tuned.measured(made).accuracy == best.accuracy
    assert tuned.measured(made).likelihood == pytest.approx(best.likelihood, abs=1e-5)


def test_best_step_puts_the_best_back_and_keeps_the_earlier_of_equals() -> None:
    model = nn.Linear(1, 1, bias=False)
    scripted = iter([Quality(0.5, -1), Quality(0.75, -1), Quality(0.75, -1), Quality(0.6, 0)])
    watch = BestStep(lambda: model, lambda: next(scripted), steps=8, checks=4)
    for step in range(1, 9):
        nn.init.constant_(model.weight, step)
        watch(step, 0.0)
    assert (watch.step, watch.best, model.weight.item()) == (4, Quality(0.75, -1), 4.0)
    last = BestStep(lambda: model, lambda: Quality(1, 0), steps=3, checks=10)
    nn.init.constant_(model.weight, 9)
    last(3, 0.0)
    assert (last.step, model.weight.item()) == (3, 9.0)


def test_of_a_grid_the_best_on_the_development_rows_is_kept(problem: Problem, tmp_path: Path) -> None:
    grid = {"learning_rate": [1e-9, 0.05], "steps": [2]}
    assert len(grid_points({**grid, "batch_size": [2, 4, 8]})) == 6
    system = LMBFF(grid=grid, demonstrations=False, checks=1)
    stages = Stages(tmp_path)
    (made,) = system.solve(problem, stages).predictors
    tuned = Tuning(problem, stages, grid_points(grid), 1)
    every = [
        dataclasses.replace(made, adapter=tmp_path / f"prompt-0-point-{number}" / "adapter") for number in range(2)
    ]
    assert tuned.measured(made) == max(tuned.measured(one) for one in every)
    assert made.adapter in [one.adapter for one in every]


def test_searched_words_are_ranked_and_the_best_answer_together(problem: Problem, tmp_path: Path) -> None:
    system, said = LMBFF(search="labels", n=3, k=4, ensemble=2, demonstrations=False, checks=1), list[str]()
    stages = Stages(tmp_path, said.append)
    solution = system.solve(problem, stages)
    assert [name for name in said if "dev" not in name] == ["search-labels", "prompt-0", "prompt-1", "prompt-2"]
    first, second = (Tuning(problem, stages).measured(one) for one in solution.predictors)
    scores = [stages.tensor(f"prompt-{number}-dev", lambda: torch.empty(0)) for number in range(3)]
    right = torch.tensor([0, 0, 1, 1])
    assert [first, second] == sorted((quality(one, right) for one in scores), reverse=True)[:2]
    assert len({str(one.scorer.to_dict()["verbalizer"]) for one in solution.predictors}) == 2
    assert system.solve(problem, stages).to_dict(tmp_path) == solution.to_dict(tmp_path)
    near = LMBFF(search="labels", n=50, k=50, near=1, demonstrations=False, checks=1)
    only = near.prompts(Tuning(problem, Stages(tmp_path / "near")))
    assert [one.verbalizer.words for one in only] == [{"neg": ("no",), "pos": ("yes",)}]


def test_searched_templates_come_beside_those_given(problem: Problem, tmp_path: Path) -> None:
    writer = t5_tokenizer(("It", "was", "yes", "no", "bad", "good", "film"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        config = T5Config(vocab_size=len(writer), decoder_start_token_id=0, **shape)  # type: ignore[arg-type]
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    writer.save_pretrained(tmp_path / "t5")
    system = LMBFF(search="templates", generator=str(tmp_path / "t5"), n=2, beam=3, demonstrations=False, checks=1)
    found = system.prompts(Tuning(problem, Stages(tmp_path / "stages")))
    assert found[0].template == problem.templates[0]
    assert len(found) == 3
    assert all(one.template.columns == ("text",) and one.template.masks == 1 for one in found)
    assert len(system.solve(problem, Stages(tmp_path / "stages")).predictors) == 1


def test_what_cannot_be_done_is_an_error_before_training(problem: Problem, tmp_path: Path) -> None:
    bare, said = dataclasses.replace(problem, dev=None), list[str]()
    for system in (LMBFF(search="labels"), LMBFF(grid={"steps": [1, 2]})):
        with pytest.raises(ConfigError, match="the development rows are to choose"):
            system.solve(bare, Stages(tmp_path, said.append))
    with pytest.raises(DataError, match="'pos' has one row alone"):
        LMBFF().solve(
            dataclasses.replace(problem, train=Labelled(rows=TRAIN.rows[:4], labels=TRAIN.labels[:4])),
            Stages(tmp_path, said.append),
        )
    assert said == []
    with pytest.raises(ConfigError, match="searched at one"):
        LMBFF(search="labels").check(dataclasses.replace(problem, templates=(Template("{text} {mask*2}"),)))
    with pytest.raises(ConfigError, match="needs a model that writes them"):
        LMBFF(search="templates")
    with pytest.raises(ConfigError, match="grid has no setting 'lr'"):
        LMBFF(grid={"lr": [1]})
    for wrong in ({"sets": 0}, {"filter": 0}, {"order": "up"}, {"search": "words"}, {"near": 0}, {"checks": True},
                  {"grid": {"steps": []}}, {"grid": {"steps": [-1]}}):  # fmt: skip
        with pytest.raises(ConfigError):
            LMBFF(**wrong)  # type: ignore[arg-type]


def interval_loss(scores: torch.Tensor, targets: torch.Tensor, low: float, high: float) -> torch.Tensor:
    step = Step(None, None, [], {}, targets, torch.Generator())  # type: ignore[arg-type]
    step._scores = scores
    return Interval(low, high)(step)


def test_an_interval_says_its_ends_at_certainty_and_the_mean_between() -> None:
    certain = torch.tensor([[90.0, -90.0], [-90.0, 90.0], [0.0, 0.0]])
    torch.testing.assert_close(Interval(-2, 5).values(certain), torch.tensor([-2.0, 5.0, 1.5]))
    assert interval_loss(certain, torch.tensor([-2.0, 5.0, 1.5]), -2, 5).item() == pytest.approx(0, abs=1e-6)


def test_an_intervals_loss_is_the_divergence_and_0_only_at_the_target() -> None:
    targets = torch.tensor([0.0, 1.0, 2.5, 5.0])
    scores = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = interval_loss(scores, targets, 0, 5)
    shares = torch.stack([1 - targets / 5, targets / 5], -1)
    by_hand = (torch.special.xlogy(shares, shares) - shares * scores.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert scores.grad is not None
    optimum = shares[1:3].log().requires_grad_()
    (gradient,) = torch.autograd.grad(interval_loss(optimum, targets[1:3], 0, 5), optimum)
    assert gradient.abs().max() < 1e-6
    torch.testing.assert_close(Interval(0, 5).values(optimum), targets[1:3])


def test_an_interval_refuses_what_lies_outside() -> None:
    with pytest.raises(DataError, match="numbers from 0 to 5"):
        interval_loss(torch.zeros(2, 2), torch.tensor([0.0, 5.1]), 0, 5)
    with pytest.raises(ConfigError, match="has 3 labels"):
        interval_loss(torch.zeros(2, 3), torch.tensor([0.0, 5.0]), 0, 5)
    with pytest.raises(ConfigError, match="smaller number"):
        Interval(1, 1)
