"""In training, a masked language model's head computes scores for the tokens to guess and for no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from inlay.tasks.batches import IGNORE
from inlay.tasks.head_positions import can_choose, head_at
from inlay.train.around import Around, Forward

if TYPE_CHECKING:
    from inlay.train.trainer import Trainer


class HeadAtLabels(Around):
    """The same loss, without the scores at positions that have no label. The outputs' logits are (labels, 1, …)."""

    def __call__(self, trainer: Trainer, forward: Forward, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The loss, and outputs with logits for the labelled positions."""
        if trainer.args.label_smoothing_factor or not can_choose(trainer.adapted):
            return forward(inputs)
        chosen = inputs["labels"] != IGNORE
        with head_at(trainer.adapted, chosen):  # type: ignore[arg-type]
            return forward({**inputs, "labels": inputs["labels"][chosen][:, None]})
