"""The head of a masked language model as something to train: all of it but the vocabulary's own matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from inlay.engine.piece import Method
from inlay.engine.sites import SiteIndex
from inlay.engine.trained_copy import CopyMethod
from inlay.methods.freezing import PartialFineTuning


def language_head(model: nn.Module, beside: Sequence[Method] = ()) -> PartialFineTuning | None:
    """Trains what stands behind the body (a transform, a norm, biases), minus the output embedding and what is tied to
    the body, and minus what the methods `beside` it train themselves (BitFit the biases, for one). None where that
    leaves nothing. BERT-base: 768² + 3 · 768 + 30,522.
    """
    whole: Any = model
    kept = {id(parameter) for parameter in whole.base_model.parameters()}
    output = whole.get_output_embeddings()
    kept |= {id(output.weight)} if output is not None else set()
    index = SiteIndex(model)
    copying = [part for method in beside for part in method.parts(index) if isinstance(part, CopyMethod)]
    kept |= {id(site.weight) for method in copying for site in method.sites(index)}
    named = model.named_parameters(remove_duplicate=False)
    names = [f"re:{name}".replace(".", "[.]") for name, parameter in named if id(parameter) not in kept]
    return PartialFineTuning(targets=names) if names else None
