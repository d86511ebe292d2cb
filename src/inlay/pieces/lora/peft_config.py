"""What HF peft's LoraConfig says of a LoRA, and what of it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from inlay.engine.peft_names import overrides_from_peft, targets_from_peft
from inlay.errors import UnsupportedError

NOT_HERE = ("megatron_config",)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Inits of peft's that change the base: what such a file holds fits only the changed base, which it does not hold."""


def fields_from_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `LoRA` that a LoraConfig gives. Raises UnsupportedError for what is not here."""
    for field in NOT_HERE:
        if config.get(field):
            raise UnsupportedError(f"this LoRA adapter uses {field}, which Inlay does not have")
    init = config.get("init_lora_weights", True)
    if str(init).lower().startswith(CHANGES_BASE):
        raise UnsupportedError(
            f"this LoRA adapter was saved by HF peft with init_lora_weights={init!r}, which also changed the base; "
            "save it there with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    dropout = config.get("lora_dropout", 0.0)
    overrides = overrides_from_peft(config, {"r": "rank_pattern", "alpha": "alpha_pattern"})
    if dropout:  # which peft leaves out, without a word, inside nn.MultiheadAttention
        overrides[r"re:(?:.*\.)?(?:in_proj_weight|out_proj\.weight)"] = {"dropout": 0.0}
    return {
        **targets_from_peft(config),
        "r": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "dropout": dropout,
        "rank_stabilised": config.get("use_rslora", False),
        "init": init if init in ("gaussian", "orthogonal") else "kaiming",
        "bias": config.get("bias", "none"),
        "lora_bias": config.get("lora_bias", False),
        "overrides": overrides,
    }


def peft_can_convolve(module: nn.Module) -> bool:
    """Whether peft's A, which copies only kernel, stride and padding, convolves as this module does."""
    return set(module.dilation) == {1} and module.padding_mode == "zeros"  # type: ignore[arg-type]
