"""Tiny models whose outputs depend on every token, and texts for them."""

from __future__ import annotations

from typing import Any

import torch
from engine import tiny
from torch import Tensor, nn

N, LENGTH = 3, 6
TEXT = torch.tensor([[7, 21, 40, 13, 9, 33], [52, 8, 30, 11, 60, 4]])
PROMPT = torch.tensor([17, 45, 28])
EAGER_ONLY = ("deberta-v2", "gemma2")
WIDE_WINDOW = {
    "gemma3": {"sliding_window": 32},
    "gemma2": {"sliding_window": 32},
    "modernbert": {"local_attention": 64},
}


def host(name: str, head: str, attention: str = "sdpa", **changes: Any) -> Any:
    """A frozen model in eval mode, with weights large enough for tokens to matter."""
    changes = {**WIDE_WINDOW.get(name, {}), **changes}
    if name not in EAGER_ONLY:
        changes["attn_implementation"] = attention
    model = tiny.build(name, head, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not name.startswith("t5"):
                parameter.mul_(8)
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = model.config.pad_token_id or 0
        model.generation_config.forced_eos_token_id = None
    return model.requires_grad_(False)


def padded(model: nn.Module, side: str) -> dict[str, Tensor]:
    """TEXT without the last two tokens of its second row, padded on one side."""
    pad: int = getattr(model.config, "pad_token_id", None) or 0  # type: ignore[union-attr, arg-type]
    ids, mask = TEXT.clone(), torch.ones_like(TEXT)
    if side == "right":
        ids[1, -2:], mask[1, -2:] = pad, 0
    else:
        ids[1] = torch.cat((torch.tensor([pad, pad]), TEXT[1, :-2]))
        mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def before(ids: Tensor, value: Tensor | int = PROMPT) -> Tensor:
    """The ids (or a mask) with a prompt of N columns before them."""
    first = value if isinstance(value, Tensor) else torch.full((N,), value)
    return torch.cat((first.to(ids.dtype).expand(*ids.shape[:-1], N), ids), dim=-1)


def without_dropout(model: Any) -> Any:
    """The model, computing the same in training mode as in eval mode."""
    for module in model.modules():
        for field in ("p", "dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    return model


def checkpoint(model: Any, reentrant: bool | None) -> None:
    """Turn gradient checkpointing on (of either kind) or off; transformers renamed both verbs."""
    verb = "enable" if reentrant is not None else "disable"
    turn = getattr(model, f"activation_checkpointing_{verb}", None) or getattr(model, f"gradient_checkpointing_{verb}")
    turn(*[{"use_reentrant": reentrant}] * (reentrant is not None))


def prompt_of(model: nn.Module) -> nn.Parameter:
    """The one parameter that is trained."""
    (found,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return found
