"""A pretrained network in a shadow's place: any model that reads the same token ids, smaller than the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.checkpoint import LOADING
from inlay.engine.piece import take, trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import ConfigError

PROJECTED = "causal_lm_with_hidden_projection"
"""What the authors' checkpoints call a model with a trained projection to the width of a larger one."""
TRUNK, PROJECTION = "shadow_model.", "shadow_hidden_projection.weight"


def read(name: str, width: int, site: Site) -> tuple[Any, nn.Linear | None]:
    """The network of a folder or hub name, and its projection to the model's width, if it brings one.

    While an adapter is loaded, its file has the values, and of the network no more than the config is read.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel
    from transformers.utils.hub import cached_file

    models: Any = AutoModel  # its class methods have no types
    projection: nn.Linear | None = None
    try:
        config = json.loads(Path(str(cached_file(name, "config.json"))).read_text(encoding="utf-8"))
        if config.get("model_type") == PROJECTED:
            network: Any = models.from_config(AutoConfig.for_model(**config["shadow_model_config"]))
            tensors = load_file(str(cached_file(name, "model.safetensors")))
            projection = projected(network, tensors, width)
        elif LOADING.get():
            network = models.from_config(AutoConfig.from_pretrained(name))
        else:
            network = models.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"Shadow(pretrained={name!r}): there is no such model to be read ({error})") from error
    if getattr(network, "pooler", None) is not None:
        network.pooler = None
    place: dict[str, Any] = {"device": site.device, "dtype": trainable_dtype(site.dtype)}
    network.requires_grad_().train(site.module.training)
    return network.to(**place), None if projection is None else projection.to(**place)


@torch.no_grad()
def projected(network: nn.Module, tensors: dict[str, Tensor], width: int) -> nn.Linear:
    """Fill the network, and make the projection that comes with it."""
    for key, value in network.state_dict().items():
        value.copy_(take(tensors, f"{TRUNK}{key}", value.shape))
    own = network.config.hidden_size  # type: ignore[union-attr]
    projection = nn.Linear(own, width, bias=False)  # type: ignore[arg-type]
    projection.weight.copy_(take(tensors, PROJECTION, projection.weight.shape))
    return projection
