"""Full fine-tuning: every parameter is trained, the upper end of the scale (Devlin et al. 2018, arXiv:1810.04805).

    W' = a copy that starts as W

The base's bits stay where they are, so the copy can be switched off, saved as an adapter, or stand beside others; it
costs the memory of a second model. Tied parameters share one copy.

Parameters: all of them, each tied one once.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from inlay.engine.parameters import parameter_sites, with_tied
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.trained_copy import CopyMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTuning(CopyMethod):
    """Train a copy of every parameter. For some of them only, `PartialFineTuning` says it better."""

    kind = "full"
    default_targets = "re:.*"
    paper = "Devlin et al. 2018, arXiv:1810.04805"
    learning_rate: ClassVar[float] = 3e-5

    def sites(self, index: SiteIndex) -> list[Site]:
        chosen = parameter_sites(
            index, self.targets, exclude=self.exclude, layers=self.layers, what=type(self).__name__
        )
        return with_tied(index, chosen)
