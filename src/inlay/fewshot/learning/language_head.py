"""The head of a masked language model as something to train: all of it but the vocabulary's own matrix."""

from __future__ import annotations

from typing import Any

from torch import nn

from inlay.methods.freezing import PartialFineTuning


def language_head(model: nn.Module) -> PartialFineTuning | None:
    """Trains what stands behind the body (a transform, a norm, biases), minus the output embedding and what is tied to
    the body. None where that leaves nothing. BERT-base: 768² + 3 · 768 + 30,522.
    """
    whole: Any = model
    kept = {id(parameter) for parameter in whole.base_model.parameters()}
    output = whole.get_output_embeddings()
    kept |= {id(output.weight)} if output is not None else set()
    named = model.named_parameters(remove_duplicate=False)
    names = [f"re:{name}".replace(".", "[.]") for name, parameter in named if id(parameter) not in kept]
    return PartialFineTuning(targets=names) if names else None
