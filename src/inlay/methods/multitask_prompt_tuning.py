"""Multitask prompt tuning: one prompt shared by all tasks, times a matrix of low rank for each.

Wang et al. (2023), "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", arXiv:2303.02861.

    P_t = P ⊙ (C_t R_t),   E' = [P_t ; E(x)]        t: the row's task; P: n × d, C_t: n × k, R_t: k × d
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from inlay.engine.checkpoint import LOADING
from inlay.engine.piece import Method, Piece, trainable_dtype
from inlay.engine.prompts.entry import peft_fields, prompt_of, prompt_pieces, prompt_sites, take_prompt
from inlay.engine.prompts.tasks import Tasks
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.prompts.checks import check_counts, check_entry
from inlay.pieces.prompts.files import take_all
from inlay.pieces.prompts.start import initial_prompt
from inlay.pieces.prompts.tasks import COLUMNS, ROWS, TaskPrompts

if TYPE_CHECKING:
    from inlay.engine.sites import Site, SiteIndex


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(Method):
    """A prompt for each task (d: width of the token embedding). Parameters: n·d + num_tasks · num_ranks · (n + d).

    A call names the task of each row: `model(**inputs, task_ids=…)`; `inlay.for_tasks` does so around `generate`.
    """

    kind = "multitask_prompt_tuning"
    hosts = frozenset({"module", "embedding"})
    peft_type = "MULTITASK_PROMPT_TUNING"
    tasks_field = "num_tasks"
    paper = "Wang et al. 2023, arXiv:2303.02861"

    num_virtual_tokens: int = 20
    """n, the vectors of one prompt."""
    num_tasks: int = 1
    """How many tasks there are."""
    num_ranks: int = 1
    """k, the rank of what is each task's own."""
    init: Literal["random", "vocabulary", "text"] = "random"
    """How the shared prompt starts, as in prompt tuning."""
    text: str | None = None
    """For init="text"; repeated or cut to n tokens."""
    tokenizer: str | None = None
    """For init="text": name or folder of the tokenizer; None takes the model's own."""
    init_from: str | None = None
    """Folder of an adapter, or of a run, whose shared prompt this one starts from."""
    init_task: Literal["average", "shared"] | int = "average"
    """For init_from: what each task's part starts from: the "average" of the tasks there, one of them, or nothing."""
    task: int | None = None
    """The task of rows whose call names none; None: it must be named, if there are several."""

    def __post_init__(self) -> None:
        check_counts(self, "num_virtual_tokens", "num_tasks", "num_ranks")
        if self.task is not None and not 0 <= self.task < self.num_tasks:
            raise ConfigError(f"MultitaskPromptTuning(task={self.task}): the tasks are 0 to {self.num_tasks - 1}")
        if self.init not in ("random", "vocabulary", "text"):
            raise ConfigError(f"MultitaskPromptTuning(init={self.init!r}): choose random, vocabulary or text")
        if self.init_task not in ("average", "shared") and not isinstance(self.init_task, int):
            raise ConfigError(
                f"MultitaskPromptTuning(init_task={self.init_task!r}): choose average, shared or the number of a task"
            )
        check_entry(self)

    def sites(self, index: SiteIndex) -> list[Site]:
        """The model, its encoder if it is an encoder–decoder, and the token embedding that reads the text."""
        return prompt_sites(index, "MultitaskPromptTuning")

    def build(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Piece]]:
        """The prompts, and the pieces that put each row's in."""
        embedding, n = sites[-1].module, self.num_virtual_tokens
        assert isinstance(embedding, nn.Embedding)
        vectors = initial_prompt(model, embedding, n, 1, self.init, self.text, None, self.tokenizer)
        vectors = vectors.to(sites[-1].device, trainable_dtype(sites[-1].dtype))
        prompts = TaskPrompts(vectors, self.num_tasks, self.num_ranks)
        if self.init_from is not None and not LOADING.get():
            prompts.start_from(model, self.init_from, self.init_task)
        return prompt_pieces(sites, prompts, n, tasks=Tasks(self.num_tasks, self.task))

    def for_file(self) -> Method:
        """The method as a file describes it: how the prompts started no longer matters."""
        return self.replace(init="random", text=None, tokenizer=None, init_from=None, init_task="average")

    def export(self, pieces: Sequence[tuple[Site, Piece]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`prompt_embeddings` (n, d), the shared prompt; columns (tasks, n, k) and rows (tasks, k, d)."""
        found = dict(prompt_of(pieces).named_parameters())
        return {"prompt_embeddings": found["prompt"], COLUMNS: found[COLUMNS], ROWS: found[ROWS]}, {}

    def import_(
        self, pieces: Sequence[tuple[Site, Piece]], tensors: dict[str, Tensor], extra: dict[str, Tensor]
    ) -> None:
        """Take them from the file; of what peft writes twice for an encoder–decoder, the first half."""
        found = self.export(pieces)[0]
        n = self.num_virtual_tokens
        columns = tensors.get(COLUMNS)
        if columns is not None and columns.ndim == 3 and columns.shape[1] == 2 * n:
            tensors[COLUMNS] = columns[:, :n]
        with torch.no_grad():
            found["prompt_embeddings"].copy_(take_prompt(tensors, found["prompt_embeddings"].shape))
        take_all({name: found[name] for name in (COLUMNS, ROWS)}, tensors)

    def to_peft(self, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
        """peft's MultitaskPromptTuningConfig."""
        if self.task is not None:
            raise UnsupportedError("HF peft has no task for rows that name none")
        more = {"num_tasks": self.num_tasks, "num_ranks": self.num_ranks, "prompt_tuning_init": "RANDOM"}
        return {**peft_fields(self.num_virtual_tokens, sites, index), **more}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> list[Method]:
        """The prompts, whatever they were started from; of an encoder–decoder, those before the source."""
        if config.get("num_transformer_submodules") == 2:
            warnings.warn(
                "HF peft has trained a second prompt before the target, which its own generate leaves out: the one "
                "before the source is loaded",
                stacklevel=2,
            )
        return [cls(**{name: config[name] for name in ("num_virtual_tokens", "num_tasks", "num_ranks")})]
