"""Stages are done once; what was stopped halfway is not there; what was made otherwise is not taken."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inlay.errors import CheckpointError
from inlay.fewshot.base import Base
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.learning.objectives import Distillation
from inlay.fewshot.predictor import Predictor
from inlay.fewshot.problem import Labelled, Problem
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.stages import Stages
from inlay.methods.lora import LoRA


def write(text: str) -> object:
    def make(folder: Path) -> dict[str, str]:
        (folder / "file.txt").write_text(text)
        return {"said": text}

    return make


def never(folder: Path) -> None:
    raise AssertionError("a finished stage was done again")


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    said = list[str]()
    stages = Stages(tmp_path, said.append)
    note = stages.once("pattern-0/seed-1", write("a"), seed=1)  # type: ignore[arg-type]
    again = stages.once("pattern-0/seed-1", never, seed=1)
    assert note == again
    assert (note["said"], said) == ("a", ["pattern-0/seed-1"])
    assert (tmp_path / "pattern-0" / "seed-1" / "file.txt").read_text() == "a"


def test_a_stage_that_fails_is_not_there(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        Stages(tmp_path).once("one", broken)
    assert list(tmp_path.iterdir()) == []
    assert Stages(tmp_path).once("one", write("b"))["said"] == "b"  # type: ignore[arg-type]


def test_a_killed_stage_is_not_there(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom inlay.fewshot.stages import Stages\n"
        "def make(folder):\n    (folder / 'half.txt').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Stages(sys.argv[1]).once('one', make)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "one").exists()
    assert Stages(tmp_path).once("one", write("c"))["said"] == "c"  # type: ignore[arg-type]
    assert not (tmp_path / "one" / "half.txt").exists()


def test_a_stage_cut_short_on_disk_is_done_again(tmp_path: Path) -> None:
    Stages(tmp_path).once("one", write("whole"))  # type: ignore[arg-type]
    (tmp_path / "one" / "file.txt").write_text("who")
    assert Stages(tmp_path).once("one", write("again"))["said"] == "again"  # type: ignore[arg-type]


def test_other_settings_are_an_error_that_names_them(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.once("one", write("a"), seed=1, rate=0.1, words={"a": ("x", "y")})  # type: ignore[arg-type]
    stages.once("one", never, seed=1, rate=0.1, words={"a": ("x", "y")})
    with pytest.raises(CheckpointError, match="made with another rate, words: start the run anew"):
        stages.once("one", never, seed=1, rate=0.2, words={"a": ("x",)})
    with pytest.raises(CheckpointError, match="made with another rate"):
        stages.once("one", never, seed=1, words={"a": ("x", "y")})


def test_a_training_under_other_settings_is_not_taken(bert_folder: Path, tmp_path: Path) -> None:
    problem = Problem(
        base=Base(str(bert_folder), device="cpu"),
        labels=("neg", "pos"),
        train=Labelled(rows=[{"text": "good"}, {"text": "bad"}], labels=["pos", "neg"]),
        templates=(Template("{text} is {mask}"),),
        verbalizer=Verbalizer({"neg": "no", "pos": "yes"}),
        text=Template("{text}"),
        methods=(LoRA(r=2),),
        recipe=Recipe(steps=1),
    )

    def trained(given: Problem) -> Predictor:
        return given.trained(Stages(tmp_path), "pattern-0", given.mask_scorer(given.templates[0]))

    first = trained(problem)
    stamp = (tmp_path / "pattern-0" / "stage.json").stat().st_mtime_ns
    assert torch.equal(
        trained(problem).scores(problem.base, problem.train.rows), first.scores(problem.base, problem.train.rows)
    )
    assert (tmp_path / "pattern-0" / "stage.json").stat().st_mtime_ns == stamp
    changes = {
        "methods": {"methods": (LoRA(r=4),)},
        "recipe": {"recipe": Recipe(steps=2)},
        "seed": {"seed": 1},
        "scorer": {"max_length": 32},
        "data": {"train": Labelled(rows=problem.train.rows, labels=["neg", "pos"])},
    }
    for setting, change in changes.items():
        with pytest.raises(CheckpointError, match=f"made with another {setting}:"):
            trained(dataclasses.replace(problem, **change))  # type: ignore[arg-type]
    scorer = problem.mask_scorer(problem.templates[0])
    with pytest.raises(CheckpointError, match="made with another objective:"):
        problem.trained(Stages(tmp_path), "pattern-0", scorer, objective=Distillation(temperature=3.0))


def test_tensors_keep_their_bits(tmp_path: Path) -> None:
    made = torch.randn(3, 5).T
    stages = Stages(tmp_path).within("ensemble")
    assert torch.equal(stages.tensor("scores", lambda: made, of=3), made)
    assert torch.equal(stages.tensor("scores", lambda: torch.zeros(1), of=3), made)
    assert (tmp_path / "ensemble" / "scores" / "tensor.safetensors").is_file()
