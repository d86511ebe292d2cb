"""A small problem for the systems that learn from patterns and unlabelled rows, and how to stop a run in its middle."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inlay import LoRA
from inlay.fewshot.base import Base
from inlay.fewshot.learning.fitting import Recipe
from inlay.fewshot.predictor import Solution
from inlay.fewshot.problem import Labelled, Problem, System
from inlay.fewshot.prompts.template import Template
from inlay.fewshot.prompts.verbalizer import Verbalizer
from inlay.fewshot.stages import Stages

LABELS = ("neg", "pos")
SIGNS = {"neg": ["awful", "terrible", "never"], "pos": ["wonderful", "great", "fine"]}
PATTERNS = ("{text} It was {mask} .", "{mask} ! {text}")


def rows(count: int, seed: int = 0) -> Labelled:
    """Rows of both labels in turn; words that tell them, among others."""
    draw = random.Random(seed)
    labels = [LABELS[number % 2] for number in range(count)]
    words = [[*draw.choices(["the", "film", "movie", "was", "really", "news"], k=3), *draw.choices(SIGNS[own], k=2)]
             for own in labels]  # fmt: skip
    return Labelled(rows=[{"text": " ".join(draw.sample(own, len(own)))} for own in words], labels=labels)


def small_problem(base: Base, **changes: Any) -> Problem:
    """Six labelled rows, 60 unlabelled ones, two patterns, a LoRA trained for 4 steps."""
    fields: dict[str, Any] = {
        "base": base,
        "labels": LABELS,
        "train": rows(6),
        "templates": tuple(map(Template, PATTERNS)),
        "verbalizer": Verbalizer({"neg": "bad", "pos": "good"}),
        "text": Template("{text}"),
        "methods": (LoRA(r=4, targets="attention,ffn"),),
        "recipe": Recipe(steps=4, batch_size=4, learning_rate=1e-2),
        "unlabelled": rows(60, seed=1).rows,
        "seed": 5,
    }
    return Problem(**{**fields, **changes})


def files(folder: Path) -> dict[str, str]:
    """What lies in a folder: the hash of each tensor file by its path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


class Stopped(Exception):
    """A run that was stopped."""


def stopped_everywhere(system: System, problem: Callable[[], Problem], folder: Path) -> int:
    """Solve a problem in a folder, stopped as every other stage begins and taken up anew; how often that was."""
    stops = 0
    while True:
        begun = 0

        def say(line: str) -> None:
            nonlocal begun
            begun += 1
            if begun == 3:
                raise Stopped

        try:
            system.solve(problem(), Stages(folder, say))
            return stops
        except Stopped:
            stops += 1


def solved(system: System, problem: Problem, folder: Path) -> Solution:
    """The solution, with its stages in the folder."""
    return system.solve(problem, Stages(folder))
