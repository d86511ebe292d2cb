"""What a method sees that has to see rows before it is attached (`Method.wants_data`): importance scores, data starts.

It sees the labelled rows as the scorer asks them, in batches whose loss is the cross-entropy of the scores, in an order
that the seed decides; so the same method comes out wherever the same rows, scorer and seed are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from inlay.engine.batches import Batch, Batches
from inlay.engine.piece import Method
from inlay.errors import ConfigError
from inlay.fewshot.learning.objectives import as_targets
from inlay.fewshot.prompts.template import Row
from inlay.fewshot.scorers.scorer import Scorer

TARGETS = "targets"


def shown(
    methods: Sequence[Method],
    model: nn.Module,
    scorer: Scorer,
    rows: Sequence[Row],
    labels: Sequence[str] | Tensor,
    *,
    batch_size: int,
    seed: int,
) -> list[Method]:
    """The methods, each that wants data having seen the rows; `labels` are names or probabilities (rows, labels).

    Raises ConfigError for a template with soft slots: nothing holds their vectors before something is attached.
    """
    wanting = [method for method in methods if method.wants_data]
    if not wanting:
        return list(methods)
    if scorer.template.soft:
        raise ConfigError(
            f"{type(wanting[0]).__name__} looks at rows before anything is trained, and the soft slots of "
            f"{scorer.template.source!r} have no vectors then: write words in their place, or choose another method"
        )
    batches = Batches(_batches(scorer, rows, as_targets(labels, scorer.labels), batch_size, seed), _loss(scorer))
    return [method.prepare(model, batches) if method.wants_data else method for method in methods]


def _batches(
    scorer: Scorer, rows: Sequence[Row], targets: Tensor, size: int, seed: int
) -> Callable[[], Iterator[dict[str, Any]]]:
    """A function that goes over the rows; each time the same batches."""
    encoded = scorer.encode(rows)

    def batches() -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(encoded), generator=generator).tolist()
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            asked = scorer.draw([encoded[index] for index in chosen], generator)
            yield {**scorer.collate(asked), TARGETS: targets[chosen]}

    return batches


def _loss(scorer: Scorer) -> Callable[[Any, Batch], Tensor]:
    def loss(model: Any, batch: Batch) -> Tensor:
        return functional.cross_entropy(scorer(model, dict(batch)), batch[TARGETS])

    return loss
