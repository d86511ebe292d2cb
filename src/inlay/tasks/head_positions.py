"""A head that looks at chosen positions only: most of a masked language model's head is work for nothing.

A masked language model is asked about few of a text's tokens (15% in training, one in a prompt), and its head computes
a score for every word of the vocabulary at every token. Within `head_at`, the head is given the chosen tokens alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from inlay.engine.prompts.virtual_tokens import PromptEntry


def can_choose(model: Any) -> bool:
    """Whether `head_at` serves: the head stands on a body of its own (as in all of transformers' masked language
    models), and no ensemble of prompts asks it several times about each row.
    """
    several = any(isinstance(module, PromptEntry) and module.code.copies > 1 for module in model.modules())
    return getattr(model, "base_model", model) is not model and not several


def logits_at(model: PreTrainedModel, chosen: Tensor, **inputs: Any) -> Tensor:
    """The logits (n, vocabulary) at the n places where `chosen` (batch, tokens) is True."""
    if not can_choose(model):
        found: Tensor = model(**inputs).logits
        return found[:, -chosen.shape[1] :][chosen]
    with head_at(model, chosen):
        logits: Tensor = model(**inputs).logits
    return logits[:, 0]


@contextlib.contextmanager
def head_at(model: PreTrainedModel, chosen: Tensor) -> Iterator[None]:
    """Within the block the model's logits are (n, 1, vocabulary): a row for each True of `chosen` (batch, tokens).

    The rows are in the order of the batch. Soft prompts before the tokens, where a method adds any, are not among them.
    A loss over all positions is the loss over these when the labels given are `labels[chosen][:, None]`.
    """

    def select(body: Any, inputs: Any, outputs: Any) -> Any:
        prompts = outputs[0].shape[1] - chosen.shape[1]
        states = outputs[0][:, prompts:][chosen][:, None]
        if isinstance(outputs, tuple):
            return (states, *outputs[1:])
        outputs["last_hidden_state"] = states
        return outputs

    hook = model.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()
