"""Rows of the training data as a model takes them, for what must see some before it is made: scores, starts, masks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import DataError, TrainingError

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
Say = Callable[[str], None]


class Batches:
    """Batches that can be gone through again and again, in one order; on the model's device when given out.

    `source` is a list of batches, each a mapping of what the model is called with, or a function that gives them anew.
    `loss(model, batch)` is by default the `loss` of the model's output. `say` is told now and then how far it has come.
    """

    def __init__(
        self, source: Iterable[Batch] | Callable[[], Iterable[Batch]], loss: Loss | None = None, say: Say | None = None
    ) -> None:
        self.source: Callable[[], Iterable[Batch]] = source if callable(source) else lambda: source
        self.loss_of = loss or model_loss
        self.say = say

    @classmethod
    def of(cls, data: Any, loss: Loss | None = None) -> Batches:
        """The data itself where it is of this class, else made of it."""
        return data if isinstance(data, Batches) else cls(data, loss)

    def first(self, model: nn.Module, count: int, what: str) -> Iterator[dict[str, Any]]:
        """The first `count` batches; all, where there are fewer. Raises DataError where there is none."""
        yield from self._told(self._placed(model), count, what)

    def repeated(self, model: nn.Module, count: int, what: str) -> Iterator[dict[str, Any]]:
        """`count` batches, begun again at the first one after the last."""
        yield from self._told(self._endless(model), count, what)

    def examples(self, model: nn.Module, count: int, what: str) -> Iterator[dict[str, Any]]:
        """The rows of the first `count` batches one by one, each as a batch of one."""
        for batch in self.first(model, count, what):
            rows = rows_of(batch)
            for row in range(rows):
                yield {
                    name: value[row : row + 1] if isinstance(value, Tensor) and value.dim() else value
                    for name, value in batch.items()
                }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of one batch. Raises TrainingError when it is no number."""
        value = self.loss_of(model, batch)
        if not bool(torch.isfinite(value.detach()).all()):
            raise TrainingError(f"the loss is {float(value.detach()):g} before training has begun: mend model or rows")
        return value

    def _placed(self, model: nn.Module) -> Iterator[dict[str, Any]]:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        for batch in self.source():
            yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _endless(self, model: nn.Module) -> Iterator[dict[str, Any]]:
        before = -1
        given = 0
        while given != before:  # a source that has run dry gives nothing more
            before = given
            for batch in self._placed(model):
                given += 1
                yield batch

    def _told(self, batches: Iterator[dict[str, Any]], count: int, what: str) -> Iterator[dict[str, Any]]:
        started, told, done = time.monotonic(), 0, 0
        for batch in batches:
            yield batch
            done += 1
            seconds = time.monotonic() - started
            if self.say is not None and seconds > 2 and (tenth := 10 * done // count) > told:
                self.say(f"{what}: {done}/{count} batches, {seconds / done * (count - done):.0f}s left")
                told = tenth
            if done >= count:
                return
        if not done:
            raise DataError(f"{what}: there is no batch to look at; give an iterable of the model's inputs with labels")


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The `loss` of the model's output. Raises DataError where it gives none."""
    found = getattr(model(**batch), "loss", None)
    if not isinstance(found, Tensor):
        raise DataError(
            f"{type(model).__name__} gives no loss for a batch of {', '.join(batch)}: add labels, or give "
            "loss=lambda model, batch: …"
        )
    return found


def rows_of(batch: Batch) -> int:
    """How many rows a batch has: the first size that its tensors share."""
    sizes = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    if len(sizes) != 1:
        raise DataError(f"the tensors of a batch ({', '.join(batch)}) have no one number of rows, but {sorted(sizes)}")
    return sizes.pop()


@contextlib.contextmanager
def looked_at(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is in evaluation mode; afterwards modes, gradients, `requires_grad` and the random
    states are what they were.
    """
    training = {module: module.training for module in model.modules()}
    gradients = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    devices = range(torch.cuda.device_count())
    model.eval()
    for parameter, _, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield model
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, required, gradient in gradients:
            parameter.requires_grad_(required)
            parameter.grad = gradient
