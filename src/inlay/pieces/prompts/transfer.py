"""What prompts take over from other tasks: where they start (SPoT), and whom they learn from (PANDA).

Vu et al. (2022), "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer", arXiv:2110.07904; Zhong et al.
(2022), "PANDA", arXiv:2208.10160.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn

from inlay.engine.checkpoint import LOADING
from inlay.engine.piece import Method, Piece
from inlay.errors import ConfigError
from inlay.pieces.prompts.distilling import Distillation, Recorder, number, teacher_of

if TYPE_CHECKING:
    from inlay.engine.controller import Controller
    from inlay.engine.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer(Method):
    """A method whose prompt can start from those of other tasks, and learn from a teacher."""

    init_from: str | tuple[str, ...] | None = None
    """Folder of an adapter, or of a run, whose prompt this one starts from; of several, the mean."""
    init_weights: tuple[float, ...] | None = None
    """For several: what each counts in the mean; None: the same."""
    distil_from: str | None = None
    """Folder of an adapter, or of a run, on the same base: the teacher whose logits the training follows."""
    distil_weight: float | tuple[str, str] = 1.0
    """What that counts in the loss: a number, or two folders, for the cosine of their prompts' means."""
    distil_compat: Literal["paper", "authors"] = "paper"
    """"authors": as PANDA's code has it, 0.01 divided by the rows of the batch; distil_weight has no meaning then."""

    def check_transfer(self) -> None:
        """Raise ConfigError for fields that cannot be used, before any file is read."""
        name = type(self).__name__
        for field in ("init_from", "init_weights", "distil_weight"):  # from YAML as lists
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.init_weights is not None and not isinstance(self.init_from, tuple):
            raise ConfigError(f"{name}(init_weights={self.init_weights}) needs init_from=, several folders")
        if self.init_from == ():
            raise ConfigError(f"{name}(init_from=()): name at least one folder, or leave it out")
        weight = self.distil_weight
        if len(weight) != 2 if isinstance(weight, tuple) else weight < 0:
            raise ConfigError(f"{name}(distil_weight={weight!r}): a number of 0 or more, or two folders of prompts")
        if self.distil_compat not in ("paper", "authors"):
            raise ConfigError(f"{name}(distil_compat={self.distil_compat!r}): choose 'paper' or 'authors'")

    def recorder(self, model: nn.Module, root: Site) -> list[tuple[Site, Piece]]:
        """The piece at the model itself that remembers what the teacher is to be asked, where there is one.

        Raises ConfigError for a teacher that does not fit. A file that is loaded may have lost its teacher: only
        training needs it.
        """
        if self.distil_from is None:
            return []
        if not LOADING.get():
            number(self.distil_weight)
            teacher_of(model, self.distil_from)
        return [(root, Recorder(model))]

    def controller(self, pieces: Mapping[str, Piece]) -> Controller | None:
        """The distillation, if there is a teacher."""
        found: Sequence[Recorder] = [piece for piece in pieces.values() if isinstance(piece, Recorder)]
        if not found or self.distil_from is None:
            return None
        return Distillation(found[0], self.distil_from, self.distil_weight, self.distil_compat == "authors")
