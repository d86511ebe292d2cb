"""Virtual tokens: how a prompt enters a model whose forward is never touched.

Two pieces that share no state at run time:

* `PromptEntry` sits on the module that receives the text (the model, or the encoder of an encoder–decoder). It writes
  virtual tokens into `input_ids` and lengthens everything that runs along with them.
* `VirtualTokens` sits on the token embedding, where it recognises those ids and answers with the prompt's vectors.

A virtual token is an id that the vocabulary does not have: `id + place · digit`, with `place` ≥ the vocabulary's size and
`digit` = 1 + the index of the prompt vector. So the models that look at ids for padding or end of text still read them
right, recomputing a layer needs nothing remembered, and several prompts (each with its own `place`) can be active at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from inlay.engine.piece import Piece
from inlay.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from inlay.engine.sites import Site, SiteIndex

Combine = Literal["logits", "log_probabilities"]

PER_TOKEN = ("logits", "prediction_logits", "last_hidden_state", "hidden_states")
SPANS = ("start_logits", "end_logits")
ZEROS = ("token_type_ids", "mm_token_type_ids", "global_attention_mask")
"""Arguments that run along the text and are 0 for a virtual token."""


@dataclasses.dataclass(frozen=True)
class Code:
    """How one adapter writes its virtual tokens: `copies` prompts of `length` vectors each."""

    length: int
    copies: int
    place: int
    added: bool

    @property
    def radix(self) -> int:
        """Digits that may occur: 0 for an ordinary token, then one for each prompt vector."""
        return self.copies * self.length + 1

    @property
    def end(self) -> int:
        """The first place that another adapter may use."""
        return self.place * self.radix

    def digits(self, batch: int, device: torch.device) -> Tensor:
        """(copies · batch, length): the digits of each row's prompt, rows ordered copy by copy."""
        digits = torch.arange(1, self.radix, device=device).view(self.copies, self.length)
        return digits.repeat_interleave(batch, dim=0)


class Prompt(nn.Module):
    """The prompt's vectors as they are: `forward()` gives (copies · length, d)."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.prompt = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.prompt


class SharesPrompt(Piece):
    """A piece that reads a prompt which one piece owns: a tuple hides it from registration, so it is saved once,
    and copying or pickling the model keeps it shared."""

    def __init__(self, prompt: nn.Module) -> None:
        super().__init__()
        self.shared = (prompt,)

    def vectors(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        """The prompt vector of each digit, and zeros for digit 0."""
        prompt = self.shared[0]().to(dtype)
        return functional.embedding(digits, functional.pad(prompt, (0, 0, 1, 0)))


class VirtualTokens(SharesPrompt):
    """On the token embedding: E(id + place · k) is p_k for a prepended prompt, E(id) + p_k for an added one."""

    def __init__(self, prompt: nn.Module, code: Code) -> None:
        super().__init__(prompt)
        self.prompt = prompt
        self.code = code

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = next(iter(kwargs)) if not args else None
        ids: Tensor = args[0] if name is None else kwargs[name]
        # The entry writes all of a prompt before at least one token, so a shorter call (a decoding step) has none of it.
        if not self.code.added and ids.shape[-1] <= self.code.length:
            return inner(*args, **kwargs)
        digits = ids.div(self.code.place, rounding_mode="floor") % self.code.radix
        plain = ids - digits * self.code.place
        embedded: Tensor = inner(plain, *args[1:], **kwargs) if name is None else inner(**{**kwargs, name: plain})
        vectors = self.vectors(digits, embedded.dtype)
        return embedded + vectors if self.code.added else torch.where(digits.unsqueeze(-1) > 0, vectors, embedded)


class PromptEntry(SharesPrompt):
    """On the module that receives the text: puts the virtual tokens in, and takes their positions out of the output.

    `positions` is the number of positions that the model has, when it has a table of them, and `first` the first of them.
    With `keep`, the output is left as long as it is: the decoder of an encoder–decoder attends to it.
    """

    def __init__(
        self,
        prompt: nn.Module,
        code: Code,
        parameters: tuple[str, ...],
        positions: int | None,
        first: int,
        combine: Combine,
        keep: bool,
    ) -> None:
        super().__init__(prompt)
        self.code = code
        self.parameters_of_host = parameters
        self.positions = positions
        self.first = first
        self.combine: Combine = combine
        self.keep = keep

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = named(self.parameters_of_host, args, kwargs)
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        if ids is None and embeds is None:
            return inner(*args, **kwargs)
        batch, length = ids.shape[:: ids.ndim - 1] if ids is not None else embeds.shape[:: embeds.ndim - 2][:2]
        code = self.code
        past = cached_length(call)
        as_tuple = call.get("return_dict") is False
        if as_tuple:
            call["return_dict"] = True
        if code.copies > 1:
            repeat_batch(call, batch, code.copies)
            check_cache(call, batch * code.copies)
        if code.added:
            self.add(call, length, past)
        else:
            self.prepend(call, length, past)
        output = inner(**call)
        if not code.added and not self.keep:
            output = cut(output, length)
        if code.copies > 1 and not self.keep:
            output = combined(output, code.copies, batch, self.combine)
        return output.to_tuple() if as_tuple and hasattr(output, "to_tuple") else output

    # -- prepended -----------------------------------------------------------------------------------------------------

    def prepend(self, call: dict[str, Any], length: int, past: int) -> None:
        """Put the prompt before the text; where the cache already holds it, only lengthen mask and positions."""
        count = self.code.length
        lengthen_mask(call, count, length, past)
        position_ids = call.get("position_ids")
        if position_ids is not None:
            position_ids = position_ids + count
        if past == 0:
            if self.positions is not None and count + length > self.positions:
                raise ConfigError(
                    f"{count} virtual tokens and a text of {length} tokens need {count + length} positions, but the model "
                    f"has {self.positions}: shorten the texts to {self.positions - count} tokens (max_length)"
                )
            if position_ids is not None:
                start = torch.arange(self.first, self.first + count, device=position_ids.device, dtype=position_ids.dtype)
                position_ids = torch.cat((start.expand(*position_ids.shape[:-1], count), position_ids), dim=-1)
            self.write_prompt(call, count, length)
        if position_ids is not None:
            call["position_ids"] = position_ids

    def write_prompt(self, call: dict[str, Any], count: int, length: int) -> None:
        """Virtual ids (or vectors, where the caller gives embeddings) first, and what runs along with them."""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        text = ids if ids is not None else embeds[..., 0]
        digits = self.code.digits(text.shape[0] // self.code.copies, text.device)
        digits = digits.view(text.shape[0], *[1] * (text.ndim - 2), count).expand(*text.shape[:-1], count)
        if ids is not None:
            call["input_ids"] = torch.cat(((digits * self.code.place).to(ids.dtype), ids), dim=-1)
        else:
            call["inputs_embeds"] = torch.cat((self.vectors(digits, embeds.dtype), embeds), dim=-2)
        for name in ZEROS:
            call[name] = before(call.get(name), count, 0, text.shape)
        for name in ("labels", "shift_labels"):
            call[name] = before(call.get(name), count, -100, text.shape)
        for name in ("start_positions", "end_positions"):
            if call.get(name) is not None:
                call[name] = call[name].clamp(min=0) + count
        if isinstance(call.get("logits_to_keep"), Tensor):
            call["logits_to_keep"] = call["logits_to_keep"] + count
        for name in [name for name, value in call.items() if value is None]:
            del call[name]

    # -- added ---------------------------------------------------------------------------------------------------------

    def add(self, call: dict[str, Any], length: int, past: int) -> None:
        """Mark the first tokens of each text (not of its padding), at whichever step of a generation they come."""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        text = ids if ids is not None else embeds[..., 0]
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        order = torch.arange(past, past + length, device=text.device).expand(text.shape)
        if mask is not None and mask.ndim == text.ndim:
            order = (mask.long().cumsum(-1) * mask.long() - 1)[..., -length:]
        elif positions is not None and positions.ndim == text.ndim:
            order = (positions - self.first).expand(text.shape)
        inside = (order >= 0) & (order < self.code.length)
        copy = torch.arange(self.code.copies, device=text.device).repeat_interleave(text.shape[0] // self.code.copies)
        digits = copy.view(-1, *[1] * (text.ndim - 1)) * self.code.length + order + 1
        digits = digits.masked_fill(~inside, 0)
        if ids is not None:
            call["input_ids"] = ids + (digits * self.code.place).to(ids.dtype)
        else:
            call["inputs_embeds"] = embeds + self.vectors(digits, embeds.dtype)


class SourceMask(Piece):
    """On an encoder–decoder whose encoder has a prompt: its cross-attention sees the prompt too, and an ensemble's
    decoder runs once per prompt."""

    def __init__(self, code: Code, parameters: tuple[str, ...], combine: Combine) -> None:
        super().__init__()
        self.code = code
        self.parameters_of_host = parameters
        self.combine: Combine = combine

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = named(self.parameters_of_host, args, kwargs)
        copies = self.code.copies
        batch = 0
        if copies > 1:
            batch = decoder_batch(call)
            repeat_batch(call, batch, copies, leave=("input_ids", "inputs_embeds"))
            check_cache(call, batch * copies)
        mask = call.get("attention_mask")
        if mask is not None and not self.code.added:
            call["attention_mask"] = ones_before(mask, self.code.length)
        output = inner(**call)
        return combined(output, copies, batch, self.combine) if copies > 1 else output


# -- arguments ---------------------------------------------------------------------------------------------------------


def named(parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(parameters, args, strict=False)), **kwargs}


def before(value: Any, count: int, fill: int, shape: torch.Size) -> Any:
    """`value` with `count` columns of `fill` before it, if it is an integer tensor that runs along a text of `shape`."""
    if not isinstance(value, Tensor) or value.shape != shape or value.is_floating_point():
        return value
    return torch.cat((value.new_full((*value.shape[:-1], count), fill), value), dim=-1)


def ones_before(mask: Tensor, count: int) -> Tensor:
    """A (…, T) mask with `count` visible columns before it."""
    return torch.cat((mask.new_ones((*mask.shape[:-1], count)), mask), dim=-1)


def cached_length(call: dict[str, Any]) -> int:
    """Tokens that the call's cache holds. A cache of fixed size is refused: it has no room for the prompt."""
    cache = call.get("past_key_values")
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", False):
        raise UnsupportedError(
            "a static cache has no room for virtual tokens, because `generate` sizes it for the text alone: leave "
            "cache_implementation unset (or use prefix tuning, which needs no room)"
        )
    return int(cache.get_seq_length())


def lengthen_mask(call: dict[str, Any], count: int, length: int, past: int) -> None:
    """Make the prompt visible in the attention mask, and refuse calls whose cache does not hold what the mask says."""
    mask = call.get("attention_mask")
    ids = call.get("input_ids")
    if mask is not None:
        dimensions = 2 if ids is None else ids.ndim
        if not isinstance(mask, Tensor) or mask.ndim != dimensions:
            raise UnsupportedError(
                "virtual tokens need an attention_mask of the text's own shape, (batch, tokens), not one prepared per query"
            )
        if past == 0 and mask.shape[-1] == count + length:  # an encoder–decoder lengthened it for both halves
            return
        if mask.shape[-1] + count != past + length and past > 0:
            raise UnsupportedError(_UNEVEN.format(past=past, expected=mask.shape[-1] + count - length))
        call["attention_mask"] = ones_before(mask, count)
    elif past > 0 and length > 1 and not torch.compiler.is_compiling():
        position_ids = call.get("position_ids")
        if position_ids is not None and int(position_ids.max()) + 1 + count != past + length:
            raise UnsupportedError(_UNEVEN.format(past=past, expected=int(position_ids.max()) + 1 + count - length))


_UNEVEN = (
    "the cache holds {past} positions, but with the virtual tokens it should hold {expected}: assisted decoding and going on "
    "from an earlier cache in `generate` count positions without the prompt; leave them off, or use prefix tuning"
)


# -- several prompts in one batch --------------------------------------------------------------------------------------


def repeat_batch(call: dict[str, Any], batch: int, copies: int, leave: tuple[str, ...] = ()) -> None:
    """Repeat every argument that has a batch dimension, copy by copy."""
    for name, value in call.items():
        if name in (*leave, "logits_to_keep", "num_items_in_batch") or not isinstance(value, Tensor) or not value.ndim:
            continue
        if value.shape[0] == batch:
            call[name] = value.repeat(copies, *[1] * (value.ndim - 1))
    if call.get("num_items_in_batch") is not None:
        call["num_items_in_batch"] = call["num_items_in_batch"] * copies


def decoder_batch(call: dict[str, Any]) -> int:
    """The batch size of the decoder's side."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if call.get(name) is not None:
            return int(call[name].shape[0])
    raise UnsupportedError("a prompt ensemble in an encoder–decoder needs decoder_input_ids or labels in the call")


def check_cache(call: dict[str, Any], rows: int) -> None:
    """Refuse a cache whose rows were reordered without the ensemble's copies."""
    cache = call.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)
    keys = getattr(cache.layers[0], "keys", None) if cache is not None and getattr(cache, "layers", None) else None
    if keys is not None and keys.ndim > 1 and keys.shape[0] != rows:
        raise UnsupportedError("beam search cannot reorder the cache of a prompt ensemble: pass use_cache=False")


def combined(output: Any, copies: int, batch: int, combine: Combine) -> Any:
    """One prediction per text: the mean over its copies, of the logits or of their log-softmax."""

    def mean(value: Any, logits: bool = False) -> Any:
        if isinstance(value, tuple):
            return tuple(mean(one) for one in value)
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != copies * batch:
            return value
        if logits and combine == "log_probabilities":
            value = value.log_softmax(-1)
        return value.view(copies, batch, *value.shape[1:]).mean(0)

    return rebuilt(output, lambda name, value: mean(value, logits="logits" in name))


# -- outputs -----------------------------------------------------------------------------------------------------------


def cut(output: Any, length: int) -> Any:
    """The output of the text alone: its last `length` positions, wherever there is one value per token."""

    def shorten(name: str, value: Any) -> Any:
        if name in PER_TOKEN and isinstance(value, tuple):
            return tuple(shorten(name, one) for one in value)
        if name in PER_TOKEN and isinstance(value, Tensor) and value.ndim > 2:
            return value[..., -length:, :]
        return value[..., -length:] if name in SPANS and isinstance(value, Tensor) else value

    return rebuilt(output, shorten)


def rebuilt(output: Any, change: Callable[[str, Any], Any]) -> Any:
    """An output of the same class whose entries have been changed by name; a bare tensor counts as hidden states."""
    if isinstance(output, Tensor):
        return change("last_hidden_state", output)
    if not hasattr(output, "items"):
        return output
    return type(output)(**{name: change(name, value) for name, value in output.items()})


# -- where -------------------------------------------------------------------------------------------------------------


def prompt_sites(index: SiteIndex, what: str) -> list[Site]:
    """The places of a prompt: the model, its encoder if it is an encoder–decoder, and the token embedding that reads
    the text, in this order. Raises UnsupportedError for models that take no token ids."""
    model, by_path = index.model, {site.path: site for site in index.sites if site.parameter is None}
    source = encoder_of(model)
    reader = model if source is None else source
    parameters = parameters_of(reader)
    embedding = _input_embedding(reader)
    if "input_ids" not in parameters or not isinstance(embedding, nn.Embedding):
        raise UnsupportedError(f"{what} needs a model that reads token ids, and {type(reader).__name__} does not")
    if "past_key_values" not in parameters and {"cache_params", "state", "mems"} & set(parameters):
        raise UnsupportedError(
            f"{what} cannot tell whether the recurrent state of {type(reader).__name__} holds the prompt already; use LoRA"
        )
    modules = [model, embedding] if source is None else [model, source, embedding]
    paths = {id(module): path for path, module in model.named_modules()}
    return [by_path[paths[id(module)]] for module in modules]


def prompt_pieces(
    sites: Sequence[Site], prompt: nn.Module, length: int, copies: int, added: bool, combine: Combine
) -> list[tuple[Site, Piece]]:
    """The pieces that put `prompt` into the places of `prompt_sites`."""
    *entries, tokens = sites
    embedding = tokens.module
    assert isinstance(embedding, nn.Embedding)
    place = max([embedding.num_embeddings, *(code.end for code in codes(embedding))])
    code = Code(length, copies, place, added)
    reader = entries[-1].module
    positions, first = position_table(reader)
    entry = PromptEntry(prompt, code, parameters_of(reader), positions, first, combine, keep=len(entries) > 1)
    pieces: list[tuple[Site, Piece]] = [(tokens, VirtualTokens(prompt, code)), (entries[-1], entry)]
    if len(entries) > 1:
        pieces.insert(0, (entries[0], SourceMask(code, parameters_of(entries[0].module), combine)))
    return pieces


def codes(embedding: nn.Module) -> Iterator[Code]:
    """The codes of the prompts that sit in this embedding already."""
    for module in embedding.modules():
        if isinstance(module, VirtualTokens):
            yield module.code


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder–decoder; None for any other model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    found = model.get_encoder() if callable(getattr(model, "get_encoder", None)) else None
    return found if isinstance(found, nn.Module) and found is not model else None


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def position_table(module: nn.Module) -> tuple[int | None, int]:
    """(positions that fit, the first position) of a model with a learned table of positions; (None, 0) otherwise."""
    for path, table in module.named_modules():
        if isinstance(table, nn.Embedding) and re.search(r"(^|\.)(wpe|embed_positions|position_embeddings?)$", path):
            first = 0 if table.padding_idx is None else table.padding_idx + 1
            return table.num_embeddings - first - int(getattr(table, "offset", 0)), first
    return None, 0


def _input_embedding(module: nn.Module) -> nn.Module | None:
    try:
        found = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
