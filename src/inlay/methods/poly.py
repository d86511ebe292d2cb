"""Poly: a library of skills, mixed for each task (Ponti et al. 2022, arXiv:2202.13914; Caccia et al. 2022).

    y = W x + 1/r · B_tᵀ A_tᵀ x,     A_t = Σ_s w_ts A_s,     B_t = Σ_s w_ts B_s,     w_t = z_t / Σ_s z_ts

t is the task of the row. z_ts is the sigmoid of a logit; in training, a draw from the relaxed Bernoulli distribution
of that logit. With `n_splits` q > 1 (multi-head routing, arXiv:2211.03831) each of q slices of the features has shares
of its own. All B_s start at zero, so the model starts as the base.

Parameters: s r (in + out) + q s tasks for each place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from inlay.engine.piece import Piece
from inlay.engine.sites import Site, SiteIndex
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.linear import LinearMethod, named
from inlay.pieces.skills import PolyPiece, RowTasks, TaskEntry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poly(LinearMethod):
    """Low-rank adapters as skills, each task a mixture of them: `model(**inputs, task_ids=…)` names each row's task."""

    kind = "poly"
    default_targets = "query,value"
    peft_type = "POLY"
    tasks_field = "n_tasks"
    paper = "Ponti et al. 2022, arXiv:2202.13914"
    peft_constants = (("poly_type", "poly"),)
    peft_conv1d = False

    r: int = named("r", 8)
    """Rank of each skill."""
    n_tasks: int = named("n_tasks", 1)
    """How many tasks there are."""
    n_skills: int = named("n_skills", 4)
    """How many skills each place has, s."""
    n_splits: int = named("n_splits", 1)
    """Into how many slices the features are cut, each with shares of its own, q."""
    task: int | None = None
    """The task of rows whose call names none; None: it must be named, if there are several."""
    sample: Literal["training", "never"] = "training"
    """When the shares are drawn: in training, anew for each row, or never."""

    def __post_init__(self) -> None:
        self.check_whole("r", "n_tasks", "n_skills", "n_splits")
        self.check_choice("sample", ("training", "never"))
        if self.task is not None and self.task not in range(self.n_tasks):
            raise ConfigError(f"Poly(task={self.task!r}): the tasks are 0 to {self.n_tasks - 1}")

    def piece(self, site: Site) -> Piece:
        return PolyPiece(self, site)

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        if any({"n_tasks", "task"} & fields.keys() for fields in self.overrides.values()):
            raise ConfigError("Poly has the same tasks at all places: n_tasks and task cannot be overridden")
        made, tasks = super().build(model, sites), RowTasks(self.n_tasks, self.task)
        for _, piece in made:
            assert isinstance(piece, PolyPiece)
            piece.tasks = tasks
        if isinstance(model, nn.Sequential):  # it takes no task_ids and runs all its children: inlay.for_tasks is left
            return made
        entry = next(site for site in SiteIndex(model).sites if site.module is model and site.parameter is None)
        return [*made, (entry, TaskEntry(tasks))]

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        if self.task is not None:
            raise UnsupportedError("HF peft has no task for rows that name none")
        return super().to_peft([site for site in sites if site.kind == "linear"], index)
