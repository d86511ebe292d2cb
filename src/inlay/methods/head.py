"""Frozen features: the base computes, only a head on top of it learns (as in Peters et al. 2019, arXiv:1903.05987).

    y = head(f(x))        f frozen

The lower end of the scale. The new head that a task class put on the pretrained trunk is trained, as it is with every
method; without one, `head` names the module to train.

Parameters: those of the head.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from inlay.engine.parameters import parameter_sites, with_tied
from inlay.engine.roles import new_heads
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.trained_copy import CopyMethod
from inlay.errors import ConfigError, TargetError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenFeatures(CopyMethod):
    """Train the head alone; no piece sits in the trunk."""

    kind = "head"
    paper = "Peters et al. 2019, arXiv:1903.05987"
    learning_rate: ClassVar[float] = 1e-3

    head: str | None = None
    """The module to train, by role or name, where the model has no new head ("lm_head", "pooler")."""

    def __post_init__(self) -> None:
        if self.head is not None and not isinstance(self.head, str):
            raise ConfigError(f"FrozenFeatures(head={self.head!r}): a role or a name is needed, such as 'lm_head'")
        if self.targets is not None or self.exclude is not None or self.layers is not None:
            raise ConfigError("FrozenFeatures has no targets, exclude or layers: nothing in the trunk is trained")

    def sites(self, index: SiteIndex) -> list[Site]:
        if self.head is not None:
            return with_tied(index, parameter_sites(index, self.head, what=type(self).__name__))
        if not new_heads(index.model):
            raise TargetError(
                f"FrozenFeatures: {type(index.model).__name__} has no new head to train; load the model with its "
                "task's class (…ForSequenceClassification, …), or name the module: FrozenFeatures(head='lm_head')"
            )
        return []
