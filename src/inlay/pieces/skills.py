"""Poly's pieces: skills, which are low-rank adapters, mixed for each row's task; and the entry that takes these in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.prompts.tasks import Tasks
from inlay.engine.sites import Site
from inlay.errors import UnsupportedError
from inlay.kernels import lora as kernel
from inlay.kernels.per_row import per_row
from inlay.pieces.interconnected import place
from inlay.pieces.recalled import recalled

TINY = 1e-12
"""Added to a sum of shares before it divides them."""


class RowTasks(Tasks):
    """The tasks of the rows of the call that the model is in, or was last."""

    what = "this adapter is"

    def __init__(self, count: int, usual: int | None) -> None:
        super().__init__(count, usual)
        self.given: Any = None

    @contextlib.contextmanager
    def being(self, task_ids: Any) -> Iterator[None]:
        self.given = None
        with super().being(task_ids):
            yield

    @property
    def one(self) -> int | None:
        """The task of all rows, where none is named for any."""
        return self.usual if self.given is None and self.now is None else None


class TaskEntry(Piece):
    """At the model's entry: takes `task_ids` out of the call.

    A block that is computed again in the backward pass needs the tasks of its own call, which may not be the last one:
    once gradients reach what a call gave, its tasks are the ones that count again.
    """

    def __init__(self, tasks: RowTasks) -> None:
        super().__init__()
        self.tasks = tasks

    def forward(self, inner: Any, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        if task_ids is not None and listens(inner):
            kwargs["task_ids"] = task_ids
        self.tasks.given = task_ids
        output = inner(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.tasks.given = None
        recalled(output, lambda: setattr(self.tasks, "given", task_ids))
        return output


def listens(inner: Any) -> bool:
    """Whether a piece further in wants to know the tasks too."""
    while inner is not None and inner.piece is not None:
        if isinstance(getattr(inner.piece, "tasks", None), Tasks):
            return True
        inner = inner.inner
    return False


class PolyPiece(Piece):
    """A (q, s, in / q, r), B (q, s, r, out / q) and the logits (tasks, q s) of q splits and s skills."""

    tasks: RowTasks

    def __init__(self, method: Any, site: Site) -> None:
        super().__init__()
        q, s, self.r, self.sample = method.n_splits, method.n_skills, method.r, method.sample
        if site.in_features % q or site.out_features % q:
            shape = f"{site.out_features} x {site.in_features}"
            raise UnsupportedError(f"Poly(n_splits={q}) cannot sit at {site.name}: {shape} does not divide")
        if "experts" in site.roles:
            raise UnsupportedError(f"Poly cannot sit at {site.name}: an expert's tokens are not the batch's rows")
        width = site.in_features // q
        self.poly_lora_A = nn.Parameter(torch.empty(q, s, width, self.r, **place(site)).uniform_(-1, 1) / width**0.5)
        self.poly_lora_B = nn.Parameter(torch.zeros(q, s, self.r, site.out_features // q, **place(site)))
        self.module_logits = nn.Parameter(torch.empty(method.n_tasks, q * s, **place(site)).uniform_(-1e-3, 1e-3))

    def shares(self, rows: int) -> Tensor:
        """How much of each skill each row gets, (rows, q, s); (1, q, s) where it is the same for all rows."""
        drawn = self.sample == "training" and self.training
        logits: Tensor = self.module_logits
        one, (splits, skills) = self.tasks.one, self.poly_lora_A.shape[:2]
        if one is not None and not drawn:
            logits = logits[one : one + 1]
        else:
            logits = logits[self.tasks.of(self.tasks.given, rows, logits.device)]
        if drawn:
            eps = torch.finfo(logits.dtype).eps
            uniform = torch.rand_like(logits).clamp(eps, 1 - eps)
            logits = logits + uniform.log() - torch.log1p(-uniform)
        gates = torch.sigmoid(logits).view(-1, splits, skills)
        return gates / (gates.sum(-1, keepdim=True) + TINY)

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        shares = self.shares(x.shape[0])
        a = torch.einsum("bqs,qsdr->bqdr", shares, self.poly_lora_A).flatten(1, 2)
        b = torch.einsum("bqs,qsrd->brqd", shares / self.r, self.poly_lora_B).flatten(2)
        if len(shares) == 1:
            return kernel.adapted(inner, x, a[0].t(), b[0].t(), 1.0)
        return per_row(inner, x, a, b)

    def file_tensors(self) -> dict[str, Tensor]:
        found = dict(self.named_parameters())
        return {"poly_router.module_logits": found.pop("module_logits"), **found}
