"""Progress of a few-shot run: a bar on a terminal, a line now and then elsewhere, nothing from Python unless asked."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from fewshot.pattern_problem import files, small_problem

from inlay.errors import TrainingError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.progress import Progress, Watch, unwatched
from inlay.fewshot.stages import Stages


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `Progress` reads, to be set by hand."""
    now = [100.0]
    monkeypatch.setattr("inlay.fewshot.progress.time.monotonic", lambda: now[0])
    return now


def test_lines_come_at_most_every_so_often_and_say_where_it_is(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(stream, every=30).watch("seed 21 (2 of 5), pattern-0", 40) as told:
        for step in range(1, 41):
            clock[0] += 4
            told(step, 0.5)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5  # 160 s
    assert lines[0] == "seed 21 (2 of 5), pattern-0: step 8/40 (20%)  loss 0.5000  0.2 steps/s  2m08s left"


def test_a_short_stage_says_nothing_elsewhere(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(stream).watch("pattern-0", 40) as told:
        for step in range(1, 41):
            clock[0] += 0.5
            told(step, 0.5)
    assert stream.getvalue() == ""


def test_a_terminal_has_one_bar_that_goes_again() -> None:
    stream = Terminal()
    progress = Progress(stream)
    with progress.watch("seed 21 (2 of 5), pattern-0", 3) as told:
        told(1, 0.25)
        progress.bar.refresh()
        progress.say("a line beside it")
    shown = stream.getvalue()
    assert "seed 21 (2 of 5), pattern-0" in shown
    assert "1/3" in shown
    assert "loss 0.2500" in shown
    assert "a line beside it\n" in shown
    assert progress.bar is None
    with pytest.raises(TrainingError), progress.watch("next", 3) as told:
        raise TrainingError("the loss became nan")
    assert progress.bar is None
    progress.say("behind it")
    assert stream.getvalue().endswith("behind it\n")


def test_no_bar_for_a_stage_without_steps() -> None:
    stream = Terminal()
    with Progress(stream).watch("asked as it is", 0):
        pass
    assert stream.getvalue() == ""


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_what_is_trained_is_the_same_with_progress(stream: io.StringIO, bert_folder: Path, tmp_path: Path) -> None:
    problem = small_problem(Base(str(bert_folder), device="cpu"), recipe=Recipe(steps=3, batch_size=2))
    scorer = problem.mask_scorer(problem.templates[0])
    watches: dict[str, Watch] = {"silent": unwatched, "shown": Progress(stream, every=0).watch}
    for name, watch in watches.items():
        torch.manual_seed(0)
        steps: list[int] = []
        part = Stages(tmp_path / name, watch=watch).within("generation-1")
        problem.trained(part, "pattern-0", scorer, each_step=lambda step, loss, seen=steps: seen.append(step))  # type: ignore[misc]
        assert steps == [1, 2, 3]  # whoever asked to be told still is
    assert files(tmp_path / "silent") == files(tmp_path / "shown")
    assert "generation-1: pattern-0" in stream.getvalue()


def test_a_stage_that_learned_little_says_so(bert_folder: Path, tmp_path: Path) -> None:
    lines: dict[float, list[str]] = {}
    for rate in (1e-9, 0.02):
        recipe = Recipe(steps=30, batch_size=4, learning_rate=rate)
        problem = small_problem(Base(str(bert_folder), device="cpu"), recipe=recipe)
        scorer = problem.mask_scorer(problem.templates[0])
        lines[rate] = []
        problem.trained(Stages(tmp_path / f"{rate}", say=lines[rate].append), "pattern-0", scorer)
    assert [line for line in lines[1e-9] if "raise the learning rate" in line]
    assert not [line for line in lines[0.02] if "raise" in line]
