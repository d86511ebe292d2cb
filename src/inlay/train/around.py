"""What may stand around a forward pass of training: a cache below it, a budget on what it keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from inlay.train.trainer import Trainer

Forward = Callable[[Mapping[str, Any]], tuple[Tensor, Any]]
"""(inputs of one batch, on the device) -> (loss, the model's outputs)."""


class Around:
    """Called in place of every forward pass of training; the default passes everything on.

    Several stand around each other. None of them changes the loss or its gradients.
    """

    def __call__(self, trainer: Trainer, forward: Forward, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The (loss, outputs) of `forward(inputs)`."""
        return forward(inputs)

    def evaluating(self, trainer: Trainer) -> contextlib.AbstractContextManager[object]:
        """Entered while the validation rows go through the model."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Called when training has ended well: let go of memory and files."""
