"""What a run leaves predicts the same when it is read again, and names nothing outside its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import inlay
from inlay.errors import CheckpointError, ConfigError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.fitting import Recipe, fit
from inlay.fewshot.predictor import Predictor, Solution
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.scorers.ensembles import combined
from inlay.fewshot.scorers.head import HeadScorer
from inlay.fewshot.scorers.mask import MaskScorer
from inlay.methods.lora import LoRA

ROWS = [{"text": text} for text in ("good film", "bad", "a really great movie", "")]
LABELS = ["pos", "neg", "pos", "neg"]


@pytest.fixture(scope="module")
def base(bert_folder: Path) -> Base:
    return Base(str(bert_folder), device="cpu")


@pytest.fixture(scope="module")
def run(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Solution]:
    """Two patterns and a head, an adapter each; one is shown demonstrations and calibrated."""
    folder = tmp_path_factory.mktemp("run")
    words = Verbalizer({"neg": ["no", "bad"], "pos": "yes"})
    scorers = [
        MaskScorer(tokenizer=base.tokenizer, template=Template(source), verbalizer=words, max_length=40)
        for source in ("{text} is {mask}", "{mask}: {text}")
    ]
    scorers.append(HeadScorer(tokenizer=base.tokenizer, template=Template("{text}"), names=("neg", "pos")))  # type: ignore[arg-type]
    for number, scorer in enumerate(scorers):
        with base.adapted(scorer.auto, [LoRA(r=2)], seed=number, labels=2) as model:
            fit(model, scorer, ROWS, LABELS, recipe=Recipe(steps=2, learning_rate=0.05))
            inlay.save(model, folder / "stages" / f"{number}")
    demos = [[(ROWS[0], "pos")], [(ROWS[1], "neg"), (ROWS[2], "pos")]]
    predictors = [
        Predictor(scorer=scorer, adapter=folder / "stages" / f"{number}") for number, scorer in enumerate(scorers)
    ]
    predictors.append(Predictor(scorer=scorers[0], demonstrations=demos, offset=(-0.5, -0.25)))
    return folder, Solution(predictors=predictors, weights=(0.5, 1.0, 2.0, 0.25), space="probability")


def test_written_and_read_again_it_gives_the_same_scores(
    run: tuple[Path, Solution], base: Base, bert_folder: Path
) -> None:
    folder, solution = run
    told = list[tuple[int, int]]()
    scores = solution.scores(base, ROWS, each=lambda done, of: told.append((done, of)))
    assert told == [(n, 4) for n in range(1, 5)]
    fields = json.loads(json.dumps(solution.to_dict(folder)))
    again = Solution.from_dict(fields, folder, Base(str(bert_folder), device="cpu"))
    assert torch.equal(again.scores(Base(str(bert_folder), device="cpu"), ROWS), scores)
    assert again.to_dict(folder) == fields
    assert again.labels == ("neg", "pos")


def test_a_run_that_was_moved_is_still_whole(run: tuple[Path, Solution], base: Base, tmp_path: Path) -> None:
    folder, solution = run
    fields, moved = solution.to_dict(folder), tmp_path / "moved"
    folder.rename(moved)
    try:
        assert torch.equal(
            Solution.from_dict(fields, moved, base).scores(base, ROWS[:1]).shape and torch.ones(1), torch.ones(1)
        )
    finally:
        moved.rename(folder)


def test_the_scores_are_the_weighted_mean_of_its_predictors(run: tuple[Path, Solution], base: Base) -> None:
    _, solution = run
    parts = [predictor.scores(base, ROWS) for predictor in solution.predictors]
    torch.testing.assert_close(
        solution.scores(base, ROWS).exp(),
        sum(w * part.softmax(-1) for w, part in zip(solution.weights, parts, strict=True)) / sum(solution.weights),
    )


def test_demonstrations_are_averaged_and_the_offset_taken_off(run: tuple[Path, Solution], base: Base) -> None:
    last = run[1].predictors[-1]
    model = base.model("masked-lm")
    plain = [last.scorer.scores(model, ROWS, demonstrations=[list(shown)] * 4) for shown in last.demonstrations]
    expected = torch.stack(plain).mean(0).log_softmax(-1) + torch.tensor([0.5, 0.25])
    torch.testing.assert_close(last.scores(base, ROWS), expected)


def test_paths_outside_the_folder_are_refused(run: tuple[Path, Solution], base: Base, tmp_path: Path) -> None:
    folder, solution = run
    fields = solution.predictors[0].to_dict(folder)
    (tmp_path / "other").mkdir()
    for outside in (f"../{folder.name}x", str(tmp_path / "other"), "stages/../../other"):
        with pytest.raises(CheckpointError, match="names an adapter outside itself"):
            Predictor.from_dict({**fields, "adapter": outside}, folder, base)
    (folder / "link").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match="names an adapter outside itself"):
        Predictor.from_dict({**fields, "adapter": "link"}, folder, base)
    with pytest.raises(CheckpointError, match="is not whole"):
        Predictor.from_dict({**fields, "adapter": "stages/9"}, folder, base)
    with pytest.raises(CheckpointError, match="is not in"):
        Predictor(scorer=solution.predictors[0].scorer, adapter=tmp_path / "other").to_dict(folder)


def test_scorers_that_nobody_knows_are_refused(run: tuple[Path, Solution], base: Base) -> None:
    fields = run[1].predictors[0].to_dict(run[0])
    for kind in ("os.system", None, "inlay.fewshot.scorers.mask.MaskScorer"):
        with pytest.raises(CheckpointError, match="known: mask"):
            Predictor.from_dict({**fields, "scorer": {**fields["scorer"], "kind": kind}}, run[0], base)


def test_equal_weights_are_the_mean_and_the_order_does_not_matter() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, weights = [torch.randn(6, 3, generator=draw) for _ in range(4)], [0.3, 0.9, 0.1, 0.7]
    for space in ("logit", "probability"):
        assert torch.equal(combined(scores, [2.0] * 4, space), combined(scores, None, space))  # type: ignore[arg-type]
        torch.testing.assert_close(
            combined(scores, weights, space), combined(scores[::-1], weights[::-1], space)  # type: ignore[arg-type]
        )  # fmt: skip
    torch.testing.assert_close(combined(scores), torch.stack(scores).mean(0))
    torch.testing.assert_close(combined(scores, [0, 1, 0, 0]), scores[1])
    for wrong in ([1.0], [1, 1, 1, -1], [0, 0, 0, 0]):
        with pytest.raises(ConfigError, match="an ensemble of 4 needs a weight each"):
            combined(scores, wrong)
    with pytest.raises(ConfigError, match="at least one"):
        Solution(predictors=[])
