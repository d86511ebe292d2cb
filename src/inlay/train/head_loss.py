"""`train.chunked_loss`: a causal language model's loss without the logits of a whole batch.

For the length of a training forward, the output head hands its input on, and the model's `loss_function`, which is
given what the head returned, computes head and loss together (`kernels.chunked_loss`). The model's own forward runs as
ever. That nothing lies between the two (a soft cap, a scale) is not looked up in any table: what the loss function is
given has to be the very tensor that the head returned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from inlay.engine.host import base_class, inlays_of
from inlay.errors import ConfigError
from inlay.kernels.chunked_loss import IGNORE, linear_cross_entropy
from inlay.train.around import Around, Forward

if TYPE_CHECKING:
    from inlay.train.trainer import Trainer


class ChunkedHeadLoss(Around):
    """Computes the loss of a causal language model chunk by chunk. The outputs then hold no logits."""

    def __call__(self, trainer: Trainer, forward: Forward, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The loss, and outputs without logits."""
        if trainer.args.label_smoothing_factor:
            raise _refused("train.label_smoothing_factor needs the logits of every class")
        with Chunked(trainer.adapted).installed() as chunked:
            try:
                loss, outputs = forward(inputs)
            except (RuntimeError, ValueError, IndexError) as error:
                if not chunked.called:  # the model computed something of its own from what it took for logits
                    raise _refused(NOT_CALLED) from error
                raise
        if not chunked.called:
            raise _refused(NOT_CALLED)
        if isinstance(outputs, dict) and "logits" in outputs:
            outputs["logits"] = None
        return loss, outputs


NOT_CALLED = "the model does not compute its loss from its head's outputs by its `loss_function`"


class Chunked:
    """The head of one model and the loss computed with it. ConfigError for heads that it cannot stand for."""

    def __init__(self, model: Any) -> None:
        self.model, self.called = model, False
        self.states: Tensor | None = None
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        name = type(model).__name__
        if head is None or "_loss_function" in vars(model) or model.loss_function is not ForCausalLMLoss:
            raise _refused(f"{name} is no causal language model with an output head and transformers' own loss")
        if base_class(type(head)) is not nn.Linear or "forward" in vars(head):
            raise _refused(f"the output head of {name} is a {type(head).__name__}, not a plain linear")
        inlays = inlays_of(head)
        if inlays is not None and next(inlays.pieces(inlays.state.active, None), None) is not None:
            raise _refused(f"the output head of {name} is adapted: take it out of the method's targets")
        if head._forward_hooks or head._forward_pre_hooks:
            raise _refused(f"the output head of {name} has hooks")
        self.head: nn.Linear = head

    @contextlib.contextmanager
    def installed(self) -> Iterator[Chunked]:
        """Within the block the head passes on and the loss function does both."""
        self.head.__dict__["forward"] = self._pass
        self.model._loss_function = self._loss
        try:
            yield self
        finally:
            del self.head.__dict__["forward"], self.model._loss_function
            self.states = None

    def _pass(self, states: Tensor) -> Tensor:
        self.states = states
        return states

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """transformers' loss of a causal language model: a mean over labels, or a sum over `num_items_in_batch`."""
        self.called = True
        if logits is not self.states:
            raise _refused(f"{type(self.model).__name__} does more to its logits than its head (a soft cap, a scale)")
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = shift_labels.to(logits.device)
        total = linear_cross_entropy(logits, self.head.weight, self.head.bias, shift_labels, ignore_index)
        if num_items_in_batch is None:
            return total / (shift_labels != ignore_index).sum()
        return total / (
            num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        )


def _refused(why: str) -> ConfigError:
    return ConfigError(f"train.chunked_loss=true cannot be used: {why}. Leave it out")
