"""The prompts of several tasks: a shared one, times what is each task's own, of low rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from inlay.engine import files
from inlay.engine.adapters import base_model
from inlay.engine.prompts.tasks import Tasks
from inlay.errors import CheckpointError, ConfigError
from inlay.pieces.prompts.saved import KEY, adapter_folder, check_base, saved_prompt

COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"


class TaskPrompts(nn.Module):
    """P ⊙ (C_t R_t) for every task t: P (n, d), C (tasks, n, k), R (tasks, k, d); `forward()` gives (tasks · n, d)."""

    def __init__(self, prompt: Tensor, tasks: int, rank: int) -> None:
        super().__init__()
        n, d = prompt.shape
        self.prompt = nn.Parameter(prompt)
        self.prefix_task_cols = nn.Parameter(0.02 * torch.randn(tasks, n, rank).to(prompt))
        self.prefix_task_rows = nn.Parameter(0.02 * torch.randn(tasks, rank, d).to(prompt))

    def forward(self) -> Tensor:
        return (self.prompt * (self.prefix_task_cols @ self.prefix_task_rows)).flatten(0, 1)

    @torch.no_grad()
    def start_from(self, model: nn.Module, folder: str | Path, task: str | int) -> None:
        """Take the shared prompt of a saved adapter, and each task's part from one of its tasks, from the mean of them
        all ("average"), or from nowhere ("shared"). Raises ConfigError for a task or a shape that does not fit.
        """
        source = saved_prompt(folder)
        check_base(source, model)
        tensors, _ = files.read_tensors(adapter_folder(folder))
        found = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
        n, d = self.prompt.shape
        wanted = {KEY: (n, d)}
        if task != "shared":
            if COLUMNS not in found or ROWS not in found:
                raise CheckpointError(f"init_from: {folder} holds no prompts of several tasks; use init_task='shared'")
            rank = self.prefix_task_cols.shape[-1]
            wanted |= {COLUMNS: (n, rank), ROWS: (rank, d)}
        found = {KEY: source.vectors, **{name: found[name] for name in wanted if name != KEY}}
        if COLUMNS in found:  # peft's file for an encoder–decoder has a second half that it never uses
            found[COLUMNS] = found[COLUMNS][:, : len(source.vectors)]
        for name, shape in wanted.items():
            if tuple(found[name].shape[-2:]) != shape:
                raise ConfigError(
                    f"init_from: {folder} has {name} of {tuple(found[name].shape)}, and {shape} is needed for each "
                    "task: set num_virtual_tokens and num_ranks as they were there"
                )
        if isinstance(task, int) and not 0 <= task < len(found[COLUMNS]):
            raise ConfigError(f"init_task={task}: {folder} has the tasks 0 to {len(found[COLUMNS]) - 1}")
        for name, parameter in ((KEY, self.prompt), (COLUMNS, self.prefix_task_cols), (ROWS, self.prefix_task_rows)):
            if name in found:
                value = found[name]
                parameter.copy_(value if name == KEY else value.mean(0) if task == "average" else value[int(task)])


@contextlib.contextmanager
def for_tasks(model: nn.Module, task_ids: Tensor | Sequence[int] | int) -> Iterator[nn.Module]:
    """Within the block, rows whose call names no task are of these: one task for all, or one for each row.

    For `generate`, which passes no task_ids on. Raises ConfigError for a model without prompts or skills.
    """
    pieces = [getattr(module, "tasks", None) for module in base_model(model).modules()]
    found = {id(tasks): tasks for tasks in pieces if isinstance(tasks, Tasks)}
    if not found:
        what = "has no prompts of tasks and no skills; attach MultitaskPromptTuning or Poly"
        raise ConfigError(f"for_tasks: {type(model).__name__} {what}")
    with contextlib.ExitStack() as stack:
        for tasks in found.values():
            stack.enter_context(tasks.being(task_ids))
        yield model
