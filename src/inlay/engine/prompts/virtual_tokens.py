"""Virtual tokens: how a prompt enters a model whose forward is never touched.

* `PromptEntry` sits on the module that receives the text (the model, or the encoder of an encoder–decoder). It writes
  virtual tokens into `input_ids` and lengthens everything that runs along with them.
* `VirtualTokens` sits on the token embedding, where it recognises those ids and answers with the prompt's vectors.

The two share no state at run time, because a virtual token is an id that no vocabulary has:
`id − base · place · digit`, with `base` beyond the vocabulary and `digit` = 1 + the index of the prompt's vector. So
models that look into the ids (for padding, or the end of the text) still read them right, layers can be recomputed with
nothing remembered, and several prompts can be active at once, each with its own `place`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from inlay.engine.piece import Piece
from inlay.engine.prompts import calls
from inlay.engine.prompts.calls import Combine
from inlay.engine.prompts.tasks import Tasks
from inlay.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Code:
    """How one adapter writes its virtual tokens: `copies` prompts of `length` vectors each, or one for each task."""

    length: int
    copies: int
    base: int
    place: int
    added: bool
    tasks: int = 1

    @property
    def radix(self) -> int:
        """How many digits there are: 0 for an ordinary token, then one for each of the prompt's vectors."""
        return self.copies * self.tasks * self.length + 1

    def write(self, ids: Tensor, digits: Tensor) -> Tensor:
        """The ids with a digit written into each."""
        return ids - (digits * (self.base * self.place)).to(ids.dtype)

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(digits, the ids without them)."""
        units = -ids.div(self.base, rounding_mode="floor")
        digits = units.div(self.place, rounding_mode="floor") % self.radix
        return digits, ids + digits * (self.base * self.place)

    def digits(self, rows: int, device: torch.device) -> Tensor:
        """(rows, length): the digits of each row's prompt; rows come copy by copy."""
        digits = torch.arange(1, self.copies * self.length + 1, device=device).view(self.copies, self.length)
        return digits.repeat_interleave(rows // self.copies, dim=0)


class Prompt(nn.Module):
    """The prompt's vectors as they are: `forward()` gives (copies · length, d)."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.prompt = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.prompt


class SharesPrompt(Piece):
    """A piece that reads a prompt which one piece owns: a tuple hides it from registration, so it is saved once,
    and copying or pickling the model keeps it shared.
    """

    def __init__(self, prompt: nn.Module, code: Code) -> None:
        super().__init__()
        self.shared = (prompt,)
        self.code = code

    def vectors(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        """The prompt's vector for each digit, and zeros for digit 0."""
        prompt = self.shared[0]().to(dtype)
        return functional.embedding(digits, functional.pad(prompt, (0, 0, 1, 0)))


class VirtualTokens(SharesPrompt):
    """On the token embedding: p_k in place of E(id) for a prepended prompt, E(id) + p_k for an added one."""

    def __init__(self, prompt: nn.Module, code: Code, owns: bool) -> None:
        super().__init__(prompt, code)
        if owns:
            self.prompt = prompt

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = None if args else next(iter(kwargs))
        ids: Tensor = args[0] if name is None else kwargs[name]
        # A prompt comes whole, before at least one token: a call no longer than it (a decoding step) has none.
        if not self.code.added and ids.shape[-1] <= self.code.length:
            return inner(*args, **kwargs)
        digits, plain = self.code.read(ids)
        embedded: Tensor = inner(plain, *args[1:], **kwargs) if name is None else inner(**{**kwargs, name: plain})
        vectors = self.vectors(digits, embedded.dtype)
        if self.code.added:
            return embedded + vectors
        text = (digits == 0).to(embedded.dtype).unsqueeze(-1)  # 1 or 0: quicker than choosing, forwards and backwards
        return (embedded * text).add_(vectors)


class PromptEntry(SharesPrompt):
    """On the module that receives the text: puts the virtual tokens in, and takes their positions out of the output.

    `positions` is how many positions the model has, where it has a table of them; `first` is the first of them. With
    `keep` the output stays as long as it is: it is an encoder's, and the decoder attends to the prompt as well.
    """

    scores_prompt: ClassVar[bool] = False
    """Whether logits are wanted at the prompt's own positions."""

    def __init__(
        self,
        prompt: nn.Module,
        code: Code,
        arguments: tuple[str, ...],
        positions: int | None,
        first: int,
        combine: Combine,
        keep: bool,
        tasks: Tasks | None = None,
    ) -> None:
        super().__init__(prompt, code)
        self.arguments = arguments
        self.positions = positions
        self.first = first
        self.combine: Combine = combine
        self.keep = keep
        self.tasks = tasks

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = calls.named(self.arguments, args, kwargs)
        text = calls.text_of(call)
        if text is None:
            return inner(*args, **kwargs)
        task_ids = call.pop("task_ids", None) if self.tasks is not None else None
        batch, length, copies = text.shape[0], text.shape[-1], self.code.copies
        as_tuple = call.get("return_dict") is False
        if as_tuple:
            call["return_dict"] = True
        if copies > 1:
            calls.repeat_batch(call, batch, copies)
        if self.code.added:
            self.add(call, length)
        else:
            self.prepend(call, length, task_ids, innermost=bool(getattr(inner, "plain", True)))
        output = inner(**call)
        if not self.keep and not self.code.added:
            output = calls.cut(output, length)
        if not self.keep and copies > 1:
            output = calls.combined(output, copies, batch, self.combine)
        return output.to_tuple() if as_tuple and hasattr(output, "to_tuple") else output

    def prepend(self, call: dict[str, Any], length: int, task_ids: Any, innermost: bool) -> None:
        """Put the prompt before the text; where the cache holds it already, only lengthen mask and positions."""
        count, past = self.code.length, calls.cached_length(call)
        positions = call.get("position_ids")
        calls.lengthen_mask(call, count, length, past, encoder=self.keep, exact=innermost)
        if positions is not None:
            call["position_ids"] = positions + count
        if past > 0:
            return
        if self.positions is not None and count + length > self.positions:
            raise ConfigError(
                f"{count} virtual tokens and a text of {length} tokens need {count + length} positions, and the model "
                f"has {self.positions}: shorten the texts to {self.positions - count} tokens (max_length)"
            )
        if positions is not None:
            start = torch.arange(self.first, self.first + count, device=positions.device, dtype=positions.dtype)
            start = start.expand(*positions.shape[:-1], count)
            call["position_ids"] = torch.cat((start, call["position_ids"]), dim=-1)
        text = calls.text_of(call)
        assert text is not None
        digits = self.code.digits(text.shape[0], text.device)
        if self.tasks is not None:
            digits = digits + self.tasks.of(task_ids, text.shape[0], text.device)[:, None] * count
        digits = digits.view(text.shape[0], *[1] * (text.ndim - 2), count).expand(*text.shape[:-1], count)
        if call.get("input_ids") is not None:
            virtual = self.code.write(text.new_zeros(()).expand_as(digits), digits)
            call["input_ids"] = torch.cat((virtual, text), dim=-1)
        else:
            embeds = call["inputs_embeds"]
            call["inputs_embeds"] = torch.cat((self.vectors(digits, embeds.dtype), embeds), dim=-2)
        calls.lengthen_companions(call, count, text.shape)
        if innermost and not self.keep and not self.scores_prompt and "logits_to_keep" in self.arguments:
            calls.leave_prompt_unscored(call, count, length)

    def add(self, call: dict[str, Any], length: int) -> None:
        """Mark the first tokens of each text (padding aside), at whichever step of a generation they come."""
        text = calls.text_of(call)
        assert text is not None
        order = calls.token_order(call, text, self.first)
        copy = torch.arange(self.code.copies, device=text.device).repeat_interleave(text.shape[0] // self.code.copies)
        digits = copy.view(-1, *[1] * (text.ndim - 1)) * self.code.length + order + 1
        digits = digits.masked_fill((order < 0) | (order >= self.code.length), 0)
        if call.get("input_ids") is not None:
            call["input_ids"] = self.code.write(text, digits)
        else:
            embeds = call["inputs_embeds"]
            call["inputs_embeds"] = embeds + self.vectors(digits, embeds.dtype)


class SourceMask(Piece):
    """On an encoder–decoder whose encoder has a prompt: its cross-attention sees the prompt, and the decoder of an
    ensemble runs once for each.
    """

    def __init__(self, code: Code, arguments: tuple[str, ...], combine: Combine, tasks: Tasks | None = None) -> None:
        super().__init__()
        self.code = code
        self.arguments = arguments
        self.combine: Combine = combine
        self.tasks = tasks

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = calls.named(self.arguments, args, kwargs)
        copies, batch = self.code.copies, 0
        if copies > 1:
            batch = calls.decoder_batch(call)
            calls.repeat_batch(call, batch, copies, leave=("input_ids", "inputs_embeds"))
        if call.get("attention_mask") is not None and not self.code.added:
            call["attention_mask"] = calls.ones_before(call["attention_mask"], self.code.length)
        if self.tasks is not None and call.get("task_ids") is not None:  # the encoder's piece will want to know
            with self.tasks.being(call.pop("task_ids")):
                return inner(**call)
        output = inner(**call)
        return calls.combined(output, copies, batch, self.combine) if copies > 1 else output
