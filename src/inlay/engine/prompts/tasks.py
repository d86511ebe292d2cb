"""Which task each row of a batch belongs to, for prompts and adapters of several tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from inlay.errors import ConfigError


class Tasks:
    """The tasks of a prompt or an adapter, and those of the rows to come, as far as the call itself does not say."""

    what = "the prompts are"
    """What errors call it that is of these tasks."""

    def __init__(self, count: int, usual: int | None) -> None:
        self.count = count
        self.usual = 0 if usual is None and count == 1 else usual
        self.now: Tensor | None = None

    @contextlib.contextmanager
    def being(self, task_ids: Any) -> Iterator[None]:
        """Within the block, rows whose call names no task are of these."""
        before, self.now = self.now, torch.as_tensor(task_ids)
        try:
            yield
        finally:
            self.now = before

    def of(self, given: Any, rows: int, device: torch.device) -> Tensor:
        """(rows,): the task of each row. Raises ConfigError when it is not known, or there is no such task."""
        given = self.now if given is None else given
        given = self.usual if given is None else given
        if given is None:
            raise ConfigError(
                f"{self.what} of {self.count} tasks, and the call does not say which: pass task_ids=, one for each "
                "row; around generate, use inlay.for_tasks(model, task_ids); or set task= for all rows"
            )
        tasks = torch.as_tensor(given, device=device, dtype=torch.long)
        if tasks.ndim == 1 and 0 < tasks.shape[0] < rows and rows % tasks.shape[0] == 0:
            tasks = tasks.repeat_interleave(rows // tasks.shape[0])  # rows that beams have repeated
        if tasks.ndim > 1 or (tasks.ndim == 1 and tasks.shape[0] != rows):
            raise ConfigError(f"task_ids of shape {tuple(tasks.shape)} for {rows} rows: give one for each row")
        if not torch.compiler.is_compiling() and not all(0 <= task < self.count for task in tasks.view(-1).tolist()):
            raise ConfigError(f"task_ids={tasks.tolist()}: {self.what} of tasks 0 to {self.count - 1}")
        return tasks.expand(rows)
