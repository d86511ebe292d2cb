"""Prompts carried from run to run by a run's settings: SPoT, PANDA, and a foundation prompt for several tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from train.interrupted import assert_resumed_is_the_same, same_adapters

from inlay.errors import ConfigError
from inlay.pieces.prompts.saved import saved_prompt
from inlay.train import Run, train
from inlay.train.transfer import transfer, transfer_runs

PROMPT = {"kind": "prompt_tuning", "num_virtual_tokens": 3}


def test_a_foundation_prompt_is_carried_to_a_task_and_the_run_resumes(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    foundation = make_run("foundation", {"num_train_epochs": 1}, method=PROMPT, task="masked-lm")
    train(foundation, progress=False)
    run = make_run("target", {"num_train_epochs": 1}, method=PROMPT)
    record = transfer(run, foundation.out, progress=False)
    teacher, student = transfer_runs(run, foundation.out)
    assert (teacher.out, record.out) == (f"{run.out}-teacher", run.out)
    assert record.method["distil_from"] == teacher.out  # type: ignore[index, call-overload]
    started = saved_prompt(foundation.out).vectors, saved_prompt(teacher.out).vectors
    assert (started[0] - started[1]).abs().max() < 0.2  # five steps of 0.01 away

    plain = make_run("plain", {"num_train_epochs": 1}, method=PROMPT)
    train(plain, progress=False)
    assert not same_adapters(plain, run)

    broken = student.replace(out=str(Path(run.out).with_name("broken")))
    assert_resumed_is_the_same(broken, run, 3, monkeypatch)


def test_what_cannot_be_carried(make_run: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match=r"carries one prompt, and the run's method is \['lora'\]"):
        transfer_runs(make_run(), "runs/source")
    with pytest.raises(ConfigError, match="leave them out"):
        transfer_runs(make_run(method={**PROMPT, "init_from": "runs/other"}), "runs/source")
    run = make_run(method={**PROMPT, "init": "zeros"})
    teacher, student = transfer_runs(run, "runs/source", weight=0.5)
    assert teacher.method == [{**PROMPT, "init_from": "runs/source"}]
    assert student.method == [{**PROMPT, "init": "zeros", "distil_from": teacher.out, "distil_weight": 0.5}]
    before = sorted(Path(run.out).parent.iterdir())
    with pytest.raises(ConfigError, match="cannot teach this model: there is no folder"):
        train(student, progress=False)
    assert sorted(Path(run.out).parent.iterdir()) == before
