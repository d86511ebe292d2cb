"""How likely a language model finds given continuations of a prompt: log p(y_t | x, y_<t) for each of their tokens.

Shapes: P prompts of T tokens, padded on the right; C continuations of each, of K tokens, padded on the right.

The prompt is read once for all its continuations. An encoder's states serve every one of them. A decoder's keys and
values do, where each token's depend on nothing but the tokens before it and their places, and the model can be told
these places; elsewhere (recurrent states, sliding windows, places told by the mask alone, adapters that act on the
whole call, such as soft prompts) every continuation is read with a prompt of its own, and the result is the same.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from inlay.errors import ConfigError
from inlay.tasks.head_positions import head_at

_PARTIAL = re.compile(r"(?<!max_)window|local|chunk|sparse|compress")
"""How configs name attention that does not see everything before a token: where padding lies then matters."""


def reads_prompt_once(model: PreTrainedModel) -> bool:
    """Whether a decoder's keys and values of a prompt can be shared without changing what comes after it."""
    config: Any = model.config.get_text_config()
    takes = set(inspect.signature(model.forward).parameters)
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    partial = {key for key, value in config.to_dict().items() if value and _PARTIAL.search(key)}
    return (
        {"past_key_values", "position_ids"} <= takes
        and kinds == {"full_attention"}
        and not partial
        and not getattr(model, "_is_stateful", False)
        and not any(getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules())
        and adapted_in_weights_only(model)
    )


def adapted_in_weights_only(model: PreTrainedModel) -> bool:
    """Whether all adapters sit in single projections, norms and embeddings: none sees or changes a call as a whole."""
    hosts = (module for module in model.modules() if "inlays" in module._modules)
    return all("weight" in host._parameters or "weight" in host._buffers for host in hosts)


def causal_log_probs(model: PreTrainedModel, prompts: Tensor, attention: Tensor, choices: Tensor, real: Tensor,
                     *, share: bool | None = None) -> Tensor:  # fmt: skip
    """log p(y_t | x, y_<t) under a decoder, (P, C, K), 0 where a choice has ended.

    prompts, attention (P, T); choices (P, C, K) with `real` True at their tokens. Each prompt has at least one token.
    `share` (None: where that changes nothing) says whether the choices use one reading of their prompt.
    """
    if share is None:
        share = choices.shape[-1] == 1 or reads_prompt_once(model)
    return (_shared if share else _apart)(model, prompts, attention, choices, real)


def _shared(model: PreTrainedModel, prompts: Tensor, attention: Tensor, choices: Tensor, real: Tensor) -> Tensor:
    several, lengths = choices.shape[-1] > 1, attention.sum(-1)
    count = choices.shape[1]
    last = torch.zeros_like(attention, dtype=torch.bool)
    last[torch.arange(len(last), device=last.device), lengths - 1] = True
    options: dict[str, Any] = {"use_cache": True} if several else {}
    logits, read = _logits_at(model, last, input_ids=prompts, attention_mask=attention, **options)
    first = logits.float().log_softmax(-1).gather(-1, choices[..., 0])
    found = torch.zeros(choices.shape, device=first.device)
    found[..., 0] = first.masked_fill(~real[..., 0], 0)
    if not several:
        return found
    cache = read.past_key_values
    cache.batch_repeat_interleave(count)
    given, follows = choices[..., :-1].flatten(0, 1), real[..., 1:].flatten(0, 1)
    seen = torch.cat([attention.repeat_interleave(count, 0), real[..., :-1].flatten(0, 1).to(attention.dtype)], 1)
    places = lengths.repeat_interleave(count)[:, None] + torch.arange(given.shape[1], device=given.device)
    logits, _ = _logits_at(
        model, follows, input_ids=given, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True
    )
    found[..., 1:] = _scattered(logits, choices[..., 1:], real[..., 1:])
    return found


def _apart(model: PreTrainedModel, prompts: Tensor, attention: Tensor, choices: Tensor, real: Tensor) -> Tensor:
    _, count, width = choices.shape
    lengths = attention.sum(-1).repeat_interleave(count)
    places = lengths[:, None] + torch.arange(width, device=choices.device)
    flat, kept = choices.flatten(0, 1), real.flatten(0, 1)
    room = prompts.new_zeros(len(flat), width)
    ids = torch.cat([prompts.repeat_interleave(count, 0), room], 1).scatter(1, places, flat)
    seen = torch.cat([attention.repeat_interleave(count, 0), room], 1).scatter(1, places, kept.to(attention.dtype))
    before = torch.zeros_like(ids, dtype=torch.bool).scatter(1, places - 1, kept)
    logits, _ = _logits_at(model, before, input_ids=ids, attention_mask=seen)
    return _scattered(logits, choices, real)


def _logits_at(model: PreTrainedModel, chosen: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
    """The logits where `chosen` (rows, tokens) is True, (n, vocabulary), and all that the model returns."""
    with head_at(model, chosen):
        read: Any = model(**inputs)
    logits: Tensor = read.logits
    if logits.shape[:2] == (int(chosen.sum()), 1):
        return logits[:, 0], read
    return logits[:, -chosen.shape[1] :][chosen], read  # the head stands on a part of the body, as in OPT


def _scattered(logits: Tensor, choices: Tensor, real: Tensor) -> Tensor:
    """Log-probabilities of the choices' tokens, one row of logits for each that is real, in the shape of `choices`."""
    values = -functional.cross_entropy(logits.float(), choices[real], reduction="none")
    return torch.zeros(choices.shape, device=values.device).masked_scatter(real, values)


def seq2seq_log_probs(model: PreTrainedModel, prompts: Tensor, attention: Tensor, choices: Tensor, real: Tensor,
                      *, share: bool | None = None) -> Tensor:  # fmt: skip
    """log p(y_t | x, y_<t) under an encoder and decoder, (P, C, K), 0 where a choice has ended; shapes as above.

    Raises ConfigError for a model that does not say which token a decoder starts with.
    """
    start = model.config.decoder_start_token_id
    if not isinstance(start, int):
        raise ConfigError(
            f"this {model.config.model_type} model does not say which token its decoder starts with: "
            "set decoder_start_token_id in its config.json"
        )
    count, flat = choices.shape[1], choices.flatten(0, 1)
    given = torch.cat([flat.new_full((len(flat), 1), start), flat[:, :-1]], 1)
    seen = attention.repeat_interleave(count, 0)
    if adapted_in_weights_only(model) if share is None else share:
        encoder: Any = model.get_encoder()
        states = encoder(input_ids=prompts, attention_mask=attention, return_dict=True)[0]
        source: dict[str, Any] = {"encoder_outputs": BaseModelOutput(states.repeat_interleave(count, 0))}
    else:
        source = {"input_ids": prompts.repeat_interleave(count, 0)}
    logits: Tensor = model(**source, attention_mask=seen, decoder_input_ids=given, use_cache=False).logits
    return _scattered(logits[real.flatten(0, 1)], choices, real)
