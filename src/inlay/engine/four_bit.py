"""bitsandbytes' 4-bit weights on a CPU stay as they were stored while an adapter is trained on them.

Called in eval mode without gradients, as every evaluation during training does, `Linear4bit` packs its codes for an
inference kernel. That kernel has no gradient (what lies below it would not learn, without a word, or fail where there
is a bias), and packing rounds the block scales, so that the way back does not lead to the same weights. At inference it
makes decoding token by token ten times faster; so it may happen as soon as nothing is trainable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from inlay.errors import UnsupportedError

SWITCH = "support_avx512bf16_for_cpu"
"""bitsandbytes' own: whether this linear may pack."""
ABLE = "_inlay_may_pack"
"""What the switch was before the first adapter came."""


def refuse_packed(model: nn.Module) -> None:
    """Raise UnsupportedError when weights have been packed: nothing can be trained on them any more."""
    for path, module in _switched(model):
        if getattr(getattr(module._parameters.get("weight"), "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedError(
                f"bitsandbytes has packed the weights of {path} for CPU inference (the model was called in eval mode "
                "without gradients), and no gradient passes them any more: load the model again and attach, or make "
                "trainable, before its first call"
            )


def hold_codes(model: nn.Module, training: bool) -> None:
    """Keep the codes as they are stored while `training`; let bitsandbytes pack them otherwise."""
    for _, module in _switched(model):
        able = module.__dict__.setdefault(ABLE, module.__dict__[SWITCH])
        module.__dict__[SWITCH] = able and not training


def never_pack(model: nn.Module) -> None:
    """Keep the codes as they are stored for good: of a base that is asked and trained on in turns."""
    for _, module in _switched(model):
        module.__dict__[SWITCH] = False


def let_go(model: nn.Module) -> None:
    """bitsandbytes' switches as they were before the first adapter came."""
    for _, module in _switched(model):
        module.__dict__[SWITCH] = module.__dict__.pop(ABLE, module.__dict__[SWITCH])


def _switched(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, module) for path, module in model.named_modules() if SWITCH in module.__dict__)
