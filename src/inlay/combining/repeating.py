"""The batch several times over, on its way into a model."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from inlay.engine.piece import Piece
from inlay.errors import UnsupportedError

SHARED = ("cache_position", "logits_to_keep", "num_items_in_batch")
"""Arguments whose first axis is not the batch."""


class RepeatPiece(Piece):
    """Around the model: every tensor with the rows of the batch is repeated, end to end."""

    def __init__(self, times: int, what: str) -> None:
        super().__init__()
        self.times = times
        self.what = what

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The output for the repeated batch."""
        if kwargs.get("past_key_values") is not None:
            raise UnsupportedError(
                f"{self.what} repeats the batch, which a model with a cache cannot follow (generate): repeat the "
                "inputs, and give each part its rows with BatchSplit"
            )
        named = {name: value for name, value in kwargs.items() if name not in SHARED}
        rows = next((t.shape[0] for t in (*args, *named.values()) if isinstance(t, Tensor) and t.dim()), None)
        if rows is None:
            raise UnsupportedError(f"{self.what} repeats the batch, and the model was called without a tensor")
        repeated = {name: self._repeated(value, rows) for name, value in named.items()}
        return inner(*(self._repeated(value, rows) for value in args), **{**kwargs, **repeated})

    def _repeated(self, value: Any, rows: int) -> Any:
        if isinstance(value, Tensor):
            alike = value.dim() and value.shape[0] == rows
            return value.repeat(self.times, *[1] * (value.dim() - 1)) if alike else value
        if isinstance(value, tuple | list):
            return type(value)(self._repeated(one, rows) for one in value)
        if isinstance(value, MutableMapping):
            made = copy.copy(value)  # of its own class: an encoder's output is one
            for key, one in value.items():
                made[key] = self._repeated(one, rows)
            return made
        return value
