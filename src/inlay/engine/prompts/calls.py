"""The arguments and outputs of a model's forward, by name, as a prompt has to change them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from inlay.errors import UnsupportedError

Combine = Literal["logits", "log_probabilities"]

PER_TOKEN = ("logits", "prediction_logits", "last_hidden_state", "hidden_states")
SPANS = ("start_logits", "end_logits")
COMPANIONS = {
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "global_attention_mask": 0,
    "labels": -100,
    "shift_labels": -100,
}
"""Arguments that run along the text, and what they say of a virtual token."""


def named(arguments: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(arguments, args, strict=False)), **kwargs}


def text_of(call: dict[str, Any]) -> Tensor | None:
    """The token ids (…, T), or something of their shape where the caller gives embeddings; None without either."""
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    if ids is not None:
        return ids  # type: ignore[no-any-return]
    return None if embeds is None else embeds[..., 0]


# -- what runs along the text ------------------------------------------------------------------------------------------


def ones_before(mask: Tensor, count: int) -> Tensor:
    """A (…, T) mask with `count` visible columns before it."""
    return torch.cat((mask.new_ones((*mask.shape[:-1], count)), mask), dim=-1)


def lengthen_companions(call: dict[str, Any], count: int, shape: torch.Size) -> None:
    """Lengthen token types and labels, and move what points at tokens, by `count` virtual tokens."""
    for name, fill in COMPANIONS.items():
        value = call.get(name)
        if isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point():
            call[name] = torch.cat((value.new_full((*shape[:-1], count), fill), value), dim=-1)
    for name in ("start_positions", "end_positions"):
        if call.get(name) is not None:
            call[name] = call[name].clamp(min=0) + count
    if isinstance(call.get("logits_to_keep"), Tensor):
        call["logits_to_keep"] = call["logits_to_keep"] + count


def leave_prompt_unscored(call: dict[str, Any], count: int, length: int) -> None:
    """Ask a language model's head for the text's `length` positions alone, and with labels for the one before, which
    foretells the text's first token; `count` virtual tokens stand there. Not where the caller says what is to be kept.
    """
    labels = call.get("labels")
    fits = labels is None or (labels.ndim == 2 and labels.shape[-1] == count + length)
    if call.get("logits_to_keep") is None and call.get("shift_labels") is None and fits:
        call["logits_to_keep"] = length + (labels is not None)
        if labels is not None:
            call["labels"] = labels[:, count - 1 :]


def cached_length(call: dict[str, Any]) -> int:
    """Positions that the call's cache holds. A cache of fixed size is refused: it has no room for a prompt."""
    cache = call.get("past_key_values")
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", False):
        raise UnsupportedError(
            "a static cache has no room for virtual tokens, because `generate` sizes it for the text alone: leave "
            "cache_implementation unset, or use prefix tuning, which needs no room"
        )
    return int(cache.get_seq_length())


def lengthen_mask(call: dict[str, Any], count: int, length: int, past: int, encoder: bool, exact: bool) -> None:
    """Make the prompt visible in the attention mask, and refuse a cache that does not hold what the call says of it.

    `exact`: no other prompt is still to be put in, so the lengths must fit now.
    """
    mask, text = call.get("attention_mask"), text_of(call)
    assert text is not None
    seen: int | None = None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != text.ndim:
            raise UnsupportedError(
                "virtual tokens need an attention_mask of the text's own shape, (batch, tokens), not one for each query"
            )
        if encoder and mask.shape[-1] > length:  # the encoder–decoder around it has lengthened the mask for both halves
            return
        call["attention_mask"] = ones_before(mask, count)
        seen = mask.shape[-1]
    elif past > 0 and length > 1 and call.get("position_ids") is not None and not torch.compiler.is_compiling():
        seen = int(call["position_ids"].max()) + 1
    if exact and past > 0 and seen is not None and seen + count != past + length:
        raise UnsupportedError(
            f"the cache holds {past} positions, but with the prompt it should hold {seen + count - length}: "
            "`generate` counts positions without the prompt when it goes on from an earlier cache; start without one, "
            "or use prefix tuning"
        )


def token_order(call: dict[str, Any], text: Tensor, first: int) -> Tensor:
    """(…, T): 0 for the first token of each text, 1 for the next, …; −1 for padding, as far as the call tells."""
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == text.ndim:
        order: Tensor = mask.long().cumsum(-1) * mask.long() - 1
        return order[..., -text.shape[-1] :]
    if positions is not None and positions.ndim == text.ndim:
        return torch.sub(positions, first).expand(text.shape)
    cache = call.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(text.shape[-1], device=text.device) + past).expand(text.shape)


# -- several prompts in one batch --------------------------------------------------------------------------------------


def repeat_batch(call: dict[str, Any], batch: int, copies: int, leave: tuple[str, ...] = ()) -> None:
    """Repeat every argument that has a batch dimension, copy by copy. A cache must have that many rows already."""
    for name, value in call.items():
        if name in (*leave, "logits_to_keep", "num_items_in_batch") or not isinstance(value, Tensor) or not value.ndim:
            continue
        if value.shape[0] == batch:
            call[name] = value.repeat(copies, *[1] * (value.ndim - 1))
    if call.get("num_items_in_batch") is not None:
        call["num_items_in_batch"] = call["num_items_in_batch"] * copies
    cache = call.get("past_key_values")
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else None
    if keys is not None and keys.ndim > 1 and keys.shape[0] != batch * copies:
        raise UnsupportedError("beam search cannot reorder the cache of a prompt ensemble: pass use_cache=False")


def decoder_batch(call: dict[str, Any]) -> int:
    """The batch size of the decoder's side."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if call.get(name) is not None:
            return int(call[name].shape[0])
    raise UnsupportedError("a prompt ensemble in an encoder–decoder needs decoder_input_ids or labels in the call")


def combined(output: Any, copies: int, batch: int, combine: Combine) -> Any:
    """One prediction for each text: the mean over the copies, of the logits or of their log-softmax."""

    def mean(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(mean(name, one) for one in value)
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != copies * batch:
            return value
        if "logits" in name and combine == "log_probabilities":
            value = value.log_softmax(-1)
        return value.view(copies, batch, *value.shape[1:]).mean(0)

    return rebuilt(output, mean)


# -- outputs -----------------------------------------------------------------------------------------------------------


def cut(output: Any, length: int) -> Any:
    """The output for the text alone: its last `length` positions, wherever there is one value per token."""

    def shorten(name: str, value: Any) -> Any:
        if name in PER_TOKEN and isinstance(value, tuple):
            return tuple(shorten(name, one) for one in value)
        if name in PER_TOKEN and isinstance(value, Tensor) and value.ndim > 2:
            return value[..., -length:, :]
        return value[..., -length:] if name in SPANS and isinstance(value, Tensor) else value

    return rebuilt(output, shorten)


def rebuilt(output: Any, change: Callable[[str, Any], Any]) -> Any:
    """An output of the same class, its entries changed by name. A bare tensor counts as hidden states."""
    if isinstance(output, Tensor):
        return change("last_hidden_state", output)
    if not hasattr(output, "items"):
        return output
    return type(output)(**{name: change(name, value) for name, value in output.items()})
