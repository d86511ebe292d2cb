"""The warm-up–stable–decay–constant schedule: its parts, its edges, its state."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import inlay
from inlay.errors import ConfigError
from inlay.train import Run
from inlay.train.schedules import Factor


def schedule(warmup: int, total: int, **options: Any) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    return optimizer, inlay.warmup_stable_decay_constant(optimizer, warmup, total, **options)


def rates(warmup: int, total: int, **options: Any) -> list[float]:
    optimizer, made = schedule(warmup, total, **options)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        made.step()
    return found


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "exponential"])
def test_the_four_parts(decay_type: str) -> None:
    found = rates(4, 100, num_stable_steps=0.3, num_decay_steps=40, min_lr_ratio=0.2, decay_type=decay_type)
    assert found[:4] == [0, 0.25, 0.5, 0.75]
    assert found[4:35] == [1.0] * 31
    assert found[74:] == pytest.approx([0.2] * 26)
    assert all(a > b for a, b in pairwise(found[34:75]))
    middle = {"linear": 0.6, "cosine": 0.6, "exponential": 0.2**0.5}[decay_type]
    assert found[54] == pytest.approx(middle)
    # Continuous: no step is larger than the steepest slope of the form, half a turn of π over 40 for the cosine.
    assert max(a - b for a, b in pairwise(found[4:])) < 0.8 * 3.15 / 2 / 40 + 0.02


@pytest.mark.parametrize(("warmup", "stable", "decay"), [(0, 0, 10), (0, 0, 0), (3, 0, 0), (0, 5, 0), (3, 7, 0)])
def test_parts_that_are_empty(warmup: int, stable: int, decay: int) -> None:
    factor = Factor(warmup, stable, decay, 0.1, "cosine")
    found = [factor(step) for step in range(12)]
    assert found[:warmup] == [step / warmup for step in range(warmup)]
    assert found[warmup : warmup + stable] == [1.0] * stable
    assert found[warmup + stable] == (1.0 if decay else 0.1)
    assert found[-1] == pytest.approx(0.1)


def test_a_schedule_goes_on_from_its_state() -> None:
    optimizer, made = schedule(2, 20)
    expected = rates(2, 20)
    for _ in range(9):
        optimizer.step()
        made.step()
    other, again = schedule(5, 30, decay_type="linear")  # what is not so any more after loading
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(made.state_dict())
    for step in range(9, 20):
        assert other.param_groups[0]["lr"] / 2 == pytest.approx(expected[step])
        other.step()
        again.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_type": "sqare"}, "one of cosine, linear, exponential"),
        ({"decay_type": "linnear"}, "did you mean 'linear'"),
        ({"num_stable_step": 3}, "did you mean 'num_stable_steps'"),
        ({"min_lr_ratio": 1.5}, "a share from 0 to 1"),
        ({"num_decay_steps": -1}, "a number of steps, or a share"),
        ({"num_decay_steps": 2.5}, "a number of steps, or a share"),
        ({"decay_type": "exponential", "min_lr_ratio": 0}, "above 0 for an exponential"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    given = {"lr_scheduler_type": "warmup_stable_decay_constant", "lr_scheduler_kwargs": options}
    with pytest.raises(ConfigError, match=message):
        Run(model="m", train=given)


def test_a_run_that_is_over_before_the_decay() -> None:
    with pytest.raises(ConfigError, match="2 steps of warm-up, 6 stable and 3 of decay are more than the run's 10"):
        schedule(2, 10, num_decay_steps=3)
