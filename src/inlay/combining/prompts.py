"""Which saved prompts are alike, and how much: what to start a new prompt from, and how strongly to follow its teacher.

    inlay.prompt_similarity("runs/mnli", "runs/rte")                      # cosine of the mean vectors
    inlay.nearest_prompts("runs/rte-early", ["runs/mnli", "runs/qqp"])    # {"runs/mnli": 0.81, "runs/qqp": 0.22}

A prompt tuned on a task is an embedding of the task (SPoT, Vu et al. 2022, arXiv:2110.07904): tasks whose prompts point
the same way have more to give to each other. Starting from one and learning from a teacher are fields of the methods:
`init_from`, `distil_from` (`inlay.pieces.prompts.transfer`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from inlay.errors import ConfigError
from inlay.pieces.prompts.distilling import similarity
from inlay.pieces.prompts.saved import saved_prompt

Prompt = str | Path | Tensor
"""A folder of an adapter or of a run, or the vectors themselves (n, d)."""


def prompt_similarity(first: Prompt, second: Prompt, measure: str = "mean") -> float:
    """How alike two prompts or prefixes are, from −1 to 1.

    `measure`: "mean", the cosine of their mean vectors (1 for equal prompts, whatever the order of their vectors), or
    "tokens", the mean over all pairs of the cosine of a vector of the one and a vector of the other. Raises
    CheckpointError for a folder without a prompt, ConfigError for prompts of models of different width.
    """
    return similarity(_vectors(first), _vectors(second), measure)


def nearest_prompts(target: Prompt, sources: Iterable[str | Path], measure: str = "mean") -> dict[str, float]:
    """The sources and their similarity to the target, the most alike first.

    The first is what SPoT's retrieval starts from; several, with their similarities as `init_weights`, its average.
    """
    folders = [str(folder) for folder in sources]
    if not folders:
        raise ConfigError("nearest_prompts was given no sources: pass folders of adapters, or of runs")
    vectors = _vectors(target)
    found = {folder: similarity(vectors, _vectors(folder), measure) for folder in folders}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _vectors(prompt: Prompt) -> Tensor:
    return prompt.detach().float() if isinstance(prompt, Tensor) else saved_prompt(prompt).vectors
