"""Where in each text an adapter is invoked: found at the model's entry, read by the pieces on its linears.

    start    the first position of the last occurrence of the invocation tokens; none where these do not occur
    gate     1 from the start on, 0 before it

What comes before the start is the base's, bit for bit, so that keys and values that the base cached stay right. The
start is kept with the cache of keys and values: a text that goes on there stays invoked.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import Piece
from inlay.engine.prompts.calls import named
from inlay.engine.prompts.entry import arguments_of
from inlay.errors import UnsupportedError
from inlay.kernels import lora as kernel
from inlay.kernels.choice import fusible
from inlay.pieces.lora.piece import LoRAPiece

NEVER = 2**40
"""A position that no text reaches."""
KEPT = "_inlay_invoked_from"
"""The attribute of a cache that holds each row's start."""


def last_start(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """The first position (B) of the last occurrence of `tokens` in each row of ids (B, T); -1 where there is none."""
    starts = ids.shape[1] - len(tokens) + 1
    if starts < 1:
        return ids.new_full((ids.shape[0],), -1)
    found = torch.ones_like(ids[:, :starts], dtype=torch.bool)
    for offset, token in enumerate(tokens):
        found = found & (ids[:, offset : offset + starts] == token)
    places = torch.arange(1, starts + 1, device=ids.device)
    return (found * places).amax(1) - 1


class Call:
    """A call that may go backward: alive as long as its graph is."""

    went_back = False

    def goes_back(self, gradient: Tensor) -> None:
        self.went_back = True


class Invocation:
    """The gate (B, T) of the call that the model is in, or, while a block is computed again, of the last one."""

    def __init__(self) -> None:
        self.gate: Tensor | None = None
        self.inside = False
        self.calls: list[weakref.ref[Call]] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"calls": []}

    def watch(self, output: Any) -> None:
        """Remember that this call, with these outputs, may go backward."""
        call, values = Call(), output.values() if isinstance(output, Mapping) else output
        for value in [values] if isinstance(values, Tensor) else values:
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(call.goes_back)  # type: ignore[no-untyped-call]
        self.calls = [*(one for one in self.calls if one() is not None), weakref.ref(call)]

    def waiting(self) -> bool:
        """Whether some call may go backward and has not."""
        return any(not call.went_back for call in (one() for one in self.calls) if call is not None)

    def of(self, x: Tensor) -> Tensor:
        """The gate in the shape of x (B, T, …) or (B · T, …), with a last dimension of one."""
        if not self.inside and self.waiting():
            raise UnsupportedError(
                "ALoRA: a block is computed again for the backward of one call while another call waits for its own, "
                "and only the last one is known: call backward after each forward, or leave gradient checkpointing"
            )
        if self.gate is None or self.gate.numel() * x.shape[-1] != x.numel():
            seen = "no text has come through the model's entry" if self.gate is None else tuple(self.gate.shape)
            raise UnsupportedError(
                f"ALoRA: a linear was given {tuple(x.shape)}, and the tokens of the text are {seen}: call the model "
                "that it was attached to, and target only places that see each token once"
            )
        return self.gate.to(x.device).view(*x.shape[:-1], 1)


class InvocationEntry(Piece):
    """At the model's entry: looks for the invocation tokens in the text."""

    def __init__(self, invocation: Invocation, tokens: Sequence[int], model: nn.Module) -> None:
        super().__init__()
        self.invocation, self.tokens = invocation, tuple(tokens)
        self.arguments = arguments_of(model)

    def forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        call = named(self.arguments, args, kwargs)
        ids, cache = call.get("input_ids"), call.get("past_key_values")
        if ids is None:
            raise UnsupportedError("ALoRA looks for its tokens in input_ids, and this call has none: pass ids")
        past = 0 if cache is None or not hasattr(cache, "get_seq_length") else cache.get_seq_length()
        here = last_start(ids, self.tokens)
        start = torch.where(here >= 0, here + past, self.kept(cache, past, here))
        gate = torch.arange(ids.shape[1], device=ids.device) + past >= start[:, None]
        output = self.called(inner, gate, args, kwargs)
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if hasattr(cache, "get_seq_length"):
            setattr(cache, KEPT, start)
        return output

    def called(self, inner: Any, gate: Tensor, args: Any, kwargs: Any) -> Any:
        """The output with this gate; without gradients the gate of a call that waits for its backward is put back."""
        known, before = self.invocation, self.invocation.gate
        known.gate, known.inside = gate, True
        try:
            output = inner(*args, **kwargs)
        finally:
            known.inside = False
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                known.watch(output)
            else:
                known.gate = before
        return output

    def kept(self, cache: Any, past: int, here: Tensor) -> Tensor:
        """Each row's start among the positions that the cache holds; NEVER where it has none there."""
        before = getattr(cache, KEPT, None)
        if before is None:
            return torch.full_like(here, NEVER)
        if here.shape[0] % before.shape[0]:
            raise UnsupportedError(f"ALoRA: {here.shape[0]} rows go on from a cache of {before.shape[0]}")
        before = before.repeat_interleave(here.shape[0] // before.shape[0])  # beams of one text
        return torch.where(before < past, before, NEVER)


class InvokedLoRAPiece(LoRAPiece):
    """y + g · s · B A x: LoRA's piece behind the gate that the entry sets."""

    invocation: Invocation

    def forward(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        gate = self.invocation.of(x)
        if self.plain and not args and not kwargs and fusible(x, self.lora_A, self.lora_B):
            p, rows = self.dropout if self.training else 0.0, gate.reshape(-1, 1)
            return kernel.adapted(inner, x, self.lora_A, self.lora_B, self.scale, p, rows)
        y = inner(x, *args, **kwargs)
        return y + (gate * self.scale * self.change(inner.module, x)).to(y.dtype)

    @property
    def mergeable(self) -> bool:
        """A change of some tokens only is no change of W."""
        return False

    def weight(self, weight: Tensor) -> Tensor:
        return Piece.weight(self, weight)
