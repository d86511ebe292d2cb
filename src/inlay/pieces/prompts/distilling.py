"""A teacher for a training run: another adapter of the same frozen base, whose predictions the student should meet.

Zhong et al. (2022), "PANDA", arXiv:2208.10160: the teacher is a prompt from another task, tuned on this one; the
student is a fresh prompt, and its loss

    L = L_task + w · mean (logits_student − logits_teacher)²

with w a number, or the similarity of two prompts. The authors' code takes w = 0.01 and divides by the rows of the batch
once more, so that the weight depends on the batch size, and leaves dropout on in the teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from inlay.engine.adapters import detach, find_adapters
from inlay.engine.checkpoint import load, task_type
from inlay.engine.controller import Controller
from inlay.engine.piece import Piece
from inlay.errors import ConfigError, InlayError, UnsupportedError
from inlay.pieces.prompts.saved import adapter_folder, saved_prompt

AUTHORS_WEIGHT = 0.1 * 0.1
"""PANDA's code: 0.1 · β, with β = 0.1."""


class Recorder(Piece):
    """On the model: remembers the last training call and its output, for the loss that is added to it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # a tuple hides it from registration
        self._seen: tuple[tuple[Any, ...], dict[str, Any], Any] | None = None

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if self.training and torch.is_grad_enabled():
            self._seen = (args, kwargs, output)
        return output

    @property
    def model(self) -> nn.Module:
        """The model that the piece sits on."""
        return self._model[0]

    def taken(self) -> tuple[tuple[Any, ...], dict[str, Any], Any] | None:
        """The last call, once."""
        seen, self._seen = self._seen, None
        return seen

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}


class Distillation(Controller):
    """Adds w · mean (logits − the teacher's)² to the loss. The teacher is made when the first step needs it."""

    def __init__(self, recorder: Recorder, folder: str, weight: float | tuple[str, str], authors: bool) -> None:
        self.recorder = recorder
        self.folder = folder
        self.weight = weight
        self.authors = authors
        self.teacher: nn.Module | None = None

    def prepare(self, total_steps: int) -> None:
        """Load the teacher, and whatever the weight is computed from."""
        self.weight = number(self.weight)
        if self.teacher is None:
            self.teacher = teacher_of(self.recorder.model, self.folder)

    def extra_loss(self) -> Tensor | None:
        """The term for the call that the model has just answered; None when it has answered none."""
        seen = self.recorder.taken()
        if seen is None:
            return None
        self.prepare(0)
        assert self.teacher is not None
        assert isinstance(self.weight, float)
        args, kwargs, output = seen
        with torch.no_grad():
            expected = self.teacher(*args, **kwargs)
        distance = logits_distance(output, expected, kwargs, task_type(self.recorder.model) == "CAUSAL_LM")
        if not self.authors:
            return self.weight * distance
        return AUTHORS_WEIGHT * distance / next(value for _, value in logits_of(output)).shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "teacher": None}


def teacher_of(model: nn.Module, folder: str) -> nn.Module:
    """The base of `model` with the adapter in `folder` on it, in eval mode: other modules, the same weights.

    Random states are left alone. Raises ConfigError for an adapter that cannot teach this model.
    """
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter  # a quantised one carries more than its bits
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    teacher = copy.deepcopy(model, shared)
    if find_adapters(teacher) is not None:
        detach(teacher)
    try:
        with torch.random.fork_rng(devices=[]):
            load(teacher, adapter_folder(folder), "teacher")
    except InlayError as error:
        raise ConfigError(f"distil_from={folder!r} cannot teach this model: {error}") from error
    return teacher.eval().requires_grad_(False)


def number(weight: float | tuple[str, str]) -> float:
    """The weight itself, or the similarity of two saved prompts, at least 0."""
    if not isinstance(weight, tuple):
        return float(weight)
    first, second = (saved_prompt(folder).vectors for folder in weight)
    return max(0.0, similarity(first, second))


def similarity(first: Tensor, second: Tensor, measure: str = "mean") -> float:
    """How alike two prompts (n, d) and (m, d) are: "mean", the cosine of their mean vectors; "tokens", the mean cosine
    of a vector of the one and a vector of the other. Raises ConfigError for prompts of unlike width.
    """
    if measure not in ("mean", "tokens"):
        raise ConfigError(f"measure={measure!r}: choose 'mean' or 'tokens'")
    if first.shape[1] != second.shape[1]:
        raise ConfigError(f"prompts of width {first.shape[1]} and {second.shape[1]} cannot be compared: use one base")
    if measure == "mean":
        first, second = first.mean(0, keepdim=True), second.mean(0, keepdim=True)
    one, other = (functional.normalize(prompt.double(), dim=-1) for prompt in (first, second))
    return float((one @ other.T).mean())


# -- logits ------------------------------------------------------------------------------------------------------------


def logits_of(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of logits in a model's output."""
    for name, value in output.items() if hasattr(output, "items") else ():
        if "logits" in name and isinstance(value, Tensor):
            yield name, value


def logits_distance(found: Any, expected: Any, call: Mapping[str, Any], causal: bool) -> Tensor:
    """The mean squared difference of two outputs' logits; of one row of them for each token, where a label is."""
    pairs = {name: (value, expected[name]) for name, value in logits_of(found)}
    if not pairs:
        raise UnsupportedError(
            "distil_from compares logits, and the model's output has none: leave return_dict and train.chunked_loss "
            "unset, on a model that predicts something"
        )
    labels, terms = call.get("labels"), []
    for mine, other in pairs.values():
        squares = (mine.float() - other.float()).square()
        if isinstance(labels, Tensor) and mine.ndim == 3 and labels.shape == mine.shape[:2]:
            seen = labels[:, 1:] != -100 if causal else labels != -100
            squares = (squares[:, :-1] if causal else squares)[seen]
        terms.append(squares.mean() if squares.numel() else squares.sum())
    return torch.stack(terms).sum()
