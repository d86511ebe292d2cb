"""Prefixes through transformers' attention interface: keys and values that every token of a layer sees.

An attention module of transformers ends in `interface(module, query, key, value, mask, **kwargs)`, where `interface` is
chosen by the name in its config. While a prefix is attached that name is `inlay|sdpa|<modelling file>`: the same
function, except that it first puts before keys and values what the `PrefixAttention` piece on the module sent along in
`kwargs`. So nothing is remembered between calls, the cache holds the text alone, and layers can be recomputed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.engine.host import base_class
from inlay.engine.piece import Piece
from inlay.engine.prompts.calls import named
from inlay.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from inlay.engine.sites import Site

MARK = "inlay|"
ARGUMENT = "inlay_prefixes"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"


class Shown:
    """One prefix on its way from its piece to the attention function: key (1, heads, n, d_k), value (1, heads, n, d_v),
    and the position bias of its columns (1, heads, queries, n) where the model has one.
    """

    def __init__(self, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
        self.key = key
        self.value = value
        self.bias = bias
        self.used = False


class Beside:
    """A prompt that is attended to by itself: g · softmax(q K_pᵀ / √d) V_p is added to what the attention gives.

    Key (1, heads, n, d_k) and value (1, heads, n, d_v); `outside`: what is to be added is left in `added` instead.
    """

    def __init__(self, key: Tensor, value: Tensor, gate: Tensor, outside: bool) -> None:
        self.key = key
        self.value = value
        self.gate = gate
        self.outside = outside
        self.used = False
        self.added: Tensor | None = None

    def add(self, output: Tensor, query: Tensor, scale: float | None) -> Tensor:
        """`output` (batch, queries, heads, d_v) with the prompt's part, for queries (batch, heads, queries, d_k)."""
        self.used = True
        groups = query.shape[1] // self.key.shape[1]
        key, value = (one.to(query.dtype).repeat_interleave(groups, dim=1) for one in (self.key, self.value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        weights = self.gate.to(query.dtype) * scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        part = (weights @ value).transpose(1, 2)
        if self.outside:
            self.added = part.flatten(2)
            return output
        return output + part


class AttentionPiece(Piece):
    """On an attention: has its attention function see more than the text."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.config = attention.config

    def show(self, inner: Callable[..., Any], shown: Shown | Beside, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call the attention with `shown` on its way to the attention function."""
        implementation = str(self.config._attn_implementation)
        if not implementation.startswith(MARK):
            raise UnsupportedError(
                f"the attention implementation was set to {implementation!r} after a prefix was attached, which would "
                "leave the prefix out: call model.set_attn_implementation before inlay.attach or inlay.load"
            )
        output = inner(*args, **{**kwargs, ARGUMENT: (shown, *kwargs.get(ARGUMENT, ()))})
        if not shown.used:
            raise UnsupportedError(
                "this attention did not hand its arguments on to its attention function: use prompt tuning"
            )
        return output

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register(str(self.config._attn_implementation))


class PrefixAttention(AttentionPiece):
    """On a self-attention: softmax(q [K_p; K]ᵀ + mask) [V_p; V], where `source()` gives (n, heads · (d_k + d_v))."""

    def __init__(
        self, source: nn.Module, length: int, shape: tuple[int, int, int], attention: Any, bias: nn.Module | None
    ) -> None:
        super().__init__(attention)
        self.source = source
        self.length = length
        self.shape = shape
        self.layer = getattr(attention, "layer_idx", None)
        # A tuple hides the base's module from registration: the first layer of a T5 stack computes all position biases.
        self.bias_of = (bias,)

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        heads, key_size, value_size = self.shape
        keys, values = self.source().split((heads * key_size, heads * value_size), dim=-1)
        shown = Shown(
            keys.view(1, self.length, heads, key_size).transpose(1, 2),
            values.view(1, self.length, heads, value_size).transpose(1, 2),
            self.position_bias(args, kwargs),
        )
        return self.show(inner, shown, args, kwargs)

    def position_bias(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Relative position bias between the queries and the prefix, which stands right before the text (T5)."""
        layer: Any = self.bias_of[0]
        if layer is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length(self.layer) if cache is not None else 0  # this layer has not been added to yet
        past = past.clone() if isinstance(past, Tensor) else past
        bias: Tensor = layer.compute_bias(hidden.shape[1], self.length, hidden.device, past + self.length)
        return bias


class PositionShift(Piece):
    """On whatever turns positions into vectors: the text's positions begin after the prefix."""

    def __init__(self, length: int, arguments: tuple[str, ...], positions: int | None, start: int) -> None:
        super().__init__()
        self.length = length
        self.arguments = arguments
        self.positions = positions
        self.start = start

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = named(self.arguments, args, kwargs)
        first = next(iter(call))
        if call.get("position_ids") is not None:
            first = "position_ids"
        elif "past_key_values_length" in self.arguments:
            call["past_key_values_length"] = call.get("past_key_values_length", 0) + self.length
            return inner(**call)
        # What lies before the first position is no position: some models give it to padding.
        call[first] = call[first] + self.length * (call[first] >= self.start)
        if self.positions is not None and call[first].shape[-1] + self.length > self.positions:
            raise ConfigError(
                f"a prefix of {self.length} and a text of {call[first].shape[-1]} tokens need more than the "
                f"{self.positions} positions that the model has: shorten the texts to {self.positions - self.length} "
                "tokens (max_length), or set shift_positions=False"
            )
        return inner(**call)


# -- the attention function --------------------------------------------------------------------------------------------


def with_prefix(original: Callable[..., Any], fills_in_causality: bool) -> Callable[..., Any]:
    """`original` over the prefixes in `inlay_prefixes` and the keys and values it is given; without any, `original`.

    A missing mask means "causal" to functions that `fill_in_causality`: the same is then said by a mask.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        inlay_prefixes: tuple[Shown | Beside, ...] = (),
        **kwargs: Any,
    ) -> Any:
        for shown in reversed(inlay_prefixes):
            if isinstance(shown, Beside):
                continue
            if attention_mask is None and fills_in_causality and query.shape[2] > 1 and is_causal(module, kwargs):
                ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
                attention_mask = ones.tril()[None, None]
            batch = key.shape[0]
            key = torch.cat((shown.key.to(key.dtype).expand(batch, -1, -1, -1), key), dim=2)
            value = torch.cat((shown.value.to(value.dtype).expand(batch, -1, -1, -1), value), dim=2)
            if attention_mask is not None:
                seen = attention_mask.new_full((), 1 if attention_mask.dtype == torch.bool else 0)
                seen = seen.expand(*attention_mask.shape[:-1], shown.key.shape[2])
                attention_mask = torch.cat((seen, attention_mask), dim=-1)
            if kwargs.get("position_bias") is not None:
                kwargs["position_bias"] = bias_before(kwargs["position_bias"], shown)
            shown.used = True
        output, *more = original(module, query, key, value, attention_mask, *args, **kwargs)
        for shown in inlay_prefixes:
            if isinstance(shown, Beside):
                output = shown.add(output, query, kwargs.get("scaling"))
        return output, *more

    return attention


def is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a call without a mask is causal, as transformers' own functions decide it."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True)) if given is None else bool(given)


def bias_before(position_bias: Tensor, shown: Shown) -> Tensor:
    """The position bias of the keys, with that of the prefix before it."""
    count = shown.key.shape[2]
    if shown.bias is None:
        bias = position_bias.new_zeros(()).expand(*position_bias.shape[:-1], count)
    else:
        bias = shown.bias.to(position_bias.dtype).expand(*position_bias.shape[:-1], count)
    return torch.cat((bias, position_bias), dim=-1)


def register(implementation: str) -> None:
    """Make the name `inlay|<implementation>|<modelling file>` known to transformers, in this process."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not implementation.startswith(MARK) or implementation in ALL_ATTENTION_FUNCTIONS:
        return
    _, kind, file = implementation.split("|", 2)
    modelling = importlib.import_module(file)
    original = getattr(modelling, INTERFACE).get_interface(kind, getattr(modelling, "eager_attention_forward", None))
    type(ALL_ATTENTION_FUNCTIONS).register(implementation, with_prefix(original, fills_in_causality=kind == "sdpa"))
    type(ALL_MASK_ATTENTION_FUNCTIONS).register(implementation, ALL_MASK_ATTENTION_FUNCTIONS[kind])


def switch_on(pieces: Iterable[AttentionPiece], sites: Iterable[Site]) -> None:
    """Let the configs of these attentions name our functions."""
    for piece, site in zip(pieces, sites, strict=True):
        current = str(piece.config._attn_implementation)
        if not current.startswith(MARK):
            implementation = f"{MARK}{current}|{modelling_file(site.module)}"
            register(implementation)
            piece.config._attn_implementation_internal = implementation


def switch_off(model: nn.Module, leaving: Iterable[AttentionPiece]) -> None:
    """Give back the names, of the configs that no staying prefix needs."""
    gone = list(leaving)
    staying = {id(m.config) for m in model.modules() if isinstance(m, AttentionPiece) and not any(m is g for g in gone)}
    for piece in gone:
        current = str(piece.config._attn_implementation)
        if current.startswith(MARK) and id(piece.config) not in staying:
            piece.config._attn_implementation_internal = current.split("|", 2)[1]


def modelling_file(module: nn.Module) -> str:
    """The Python module in which an attention's forward was written."""
    return str(inspect.unwrap(base_class(type(module)).forward).__globals__["__name__"])
