"""A prompt made of example tokens, each vector of which may move a little; and the loss on the examples' own labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from inlay.engine.controller import Controller
from inlay.engine.prompts import calls
from inlay.engine.prompts.virtual_tokens import PromptEntry
from inlay.errors import UnsupportedError

KINDS = 4
"""Token types count by fours: 1 a template around an input, 2 an input, 3 a template around a label, 4 a label; 5 to 8
are the next example's, and so on. 0 is none of these."""
IGNORED = -100
WIDTH = 2048
"""The width at which a radius means what it says; others scale with its square root."""


class ContextPrompt(nn.Module):
    """e_i + δ_i, ‖δ_i‖ ≤ ε_i: (n, d). Labels, and what is of no type, stay as they are."""

    center: Tensor
    radius: Tensor

    def __init__(self, center: Tensor, types: Sequence[int], epsilon: float, format_epsilon: float) -> None:
        super().__init__()
        scale = (center.shape[1] / WIDTH) ** 0.5
        each = [0.0, format_epsilon * scale, epsilon * scale, format_epsilon * scale]
        radius = torch.tensor([each[kind % KINDS] for kind in types])
        self.delta = nn.Parameter(torch.zeros_like(center))
        self.register_buffer("center", center)
        self.register_buffer("radius", radius.to(center.device)[:, None])

    def within(self) -> Tensor:
        """δ, drawn back into its balls."""
        norm = self.delta.norm(dim=1, keepdim=True).clamp(min=torch.finfo(self.delta.dtype).tiny)
        within: Tensor = self.delta * (self.radius / norm).clamp(max=1)
        return within

    def forward(self) -> Tensor:
        with torch.no_grad():
            back = self.within() - self.delta
        moving = (self.radius > 0).to(self.delta.dtype)
        return self.center + (self.delta + back) * moving  # the gradient is taken at the point drawn back


class Projection(Controller):
    """Draws δ back into its balls after each step."""

    def __init__(self, prompt: ContextPrompt) -> None:
        self.prompt = prompt

    def after_step(self, optimizer: Optimizer) -> None:
        """Write the projected values."""
        with torch.no_grad():
            self.prompt.delta.copy_(self.prompt.within())


class ContextEntry(PromptEntry):
    """The prompt's entry, which also learns from the labels inside the prompt. A causal language model's."""

    scores_prompt = True
    tokens: tuple[int, ...] = ()
    types: tuple[int, ...] = ()
    decay: float = 1.0

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = calls.named(self.arguments, args, kwargs)
        types, text = call.pop("input_type_mask", None), calls.text_of(call)
        labels = call.get("labels")
        if labels is None or text is None:
            return super().forward(inner, **call)
        if labels.shape != text.shape:
            raise UnsupportedError("CPT trains causal language models, whose labels are the text's own tokens")
        items = call.pop("num_items_in_batch", None)
        del call["labels"]

        def with_loss(**call: Any) -> Any:
            output = inner(**call)
            loss = self.loss(output.logits, labels, types)
            if items is not None:  # one of several batches of a step: it counts as much as it has labels
                loss = loss * (labels[:, 1:] != IGNORED).sum() / items
            return type(output)(**{"loss": loss, **{k: v for k, v in output.items() if k != "loss"}})

        with_loss.plain = getattr(inner, "plain", True)  # type: ignore[attr-defined]
        return super().forward(with_loss, **call)

    def loss(self, logits: Tensor, labels: Tensor, types: Tensor | None) -> Tensor:
        """The mean over all labels, of the prompt and of the text, of w · cross entropy: w is 1 for the text, and
        `decay` smaller from each example to the one before it.
        """
        rows, device = labels.shape[0], labels.device
        after = -(-max(self.types) // KINDS) * KINDS  # the text comes after all examples
        own = [torch.tensor(values, device=device).expand(rows, -1) for values in (self.types, self.tokens)]
        last = KINDS if types is None else int(types.max())
        types = torch.full_like(labels, KINDS) if types is None else types.to(labels)
        types = torch.cat((own[0], torch.where(types > 0, types + after, 0)), dim=1)[:, 1:]
        targets = torch.cat((own[1], labels), dim=1)[:, 1:]
        example = torch.where(types % KINDS == 0, types // KINDS, 0)  # whose label a token is; 0 for no label
        # Of the examples that a row has, the last counts whole, the one before it `decay`, and so on.
        there = torch.zeros(rows, (after + last) // KINDS + 1, device=device).scatter(1, example, 1.0)
        later = there.flip(1).cumsum(1).flip(1) - there
        weights = self.decay ** later.gather(1, example)
        targets = targets.masked_fill(example == 0, IGNORED)
        followed = functional.pad(targets, (0, 1), value=IGNORED).flatten()  # so that the logits need no copy
        losses = functional.cross_entropy(logits.float().flatten(0, 1), followed, reduction="none").view(rows, -1)
        return (losses[:, :-1] * weights).sum() / (targets != IGNORED).sum()
