"""Where a shadow sits, and the small network of the model's own kind that its first state comes from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from inlay.engine.host import base_class
from inlay.engine.piece import trainable_dtype
from inlay.engine.prompts.entry import arguments_of, encoder_of
from inlay.engine.sites import Site, SiteIndex
from inlay.engine.structure import ancestors, parent
from inlay.errors import ConfigError, TargetError, UnsupportedError

NAMES = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
}
"""What configs call a model's sizes."""


def check_blocks(index: SiteIndex, blocks: Sequence[Site]) -> None:
    """Refuse places that are no blocks, blocks of several stacks, and gaps between them."""
    wrong = [site.path for site in blocks if "block" not in site.roles]
    if wrong:
        raise TargetError(f"Shadow cannot sit at {wrong[0] or 'the root'!r}, which is no block: target 'block'")
    stacks = {parent(site.path) for site in blocks}
    if len(stacks) > 1 or encoder_of(index.model) is not None:
        raise UnsupportedError(
            f"Shadow needs a model of one stack of blocks, and {type(index.model).__name__} has several: use LoRA"
        )
    numbers = [site.layer for site in blocks]
    first = numbers[0] or 0
    if numbers != list(range(first, first + len(numbers))):
        raise ConfigError(f"Shadow: its blocks must follow upon each other, and {numbers} do not")


def holder_of(index: SiteIndex, blocks: Sequence[Site]) -> Site:
    """The module that makes embeddings of a text and runs the blocks: the nearest one above that takes embeddings."""
    places = {site.path: site for site in index.sites if site.parameter is None}
    for path in ancestors(parent(blocks[0].path)):
        module: Any = places[path].module if path in places else None
        if module is not None and hasattr(module, "config") and "inputs_embeds" in arguments_of(module):
            try:
                embedding = module.get_input_embeddings()
            except (AttributeError, NotImplementedError):
                continue
            if isinstance(embedding, nn.Embedding):
                return places[path]
    name = type(index.model).__name__
    raise UnsupportedError(f"Shadow needs a model that reads text and takes inputs_embeds, and {name} does not")


def setting(config: Any, field: str) -> str:
    """What this config calls a size. UnsupportedError where it has none."""
    found = next((name for name in NAMES[field] if hasattr(config, name)), None)
    if found is None:
        raise UnsupportedError(f"Shadow needs a model whose config has one of {', '.join(NAMES[field])}")
    return found


def size(config: Any, field: str) -> int:
    """The size itself."""
    return int(getattr(config, setting(config, field)))


def smaller(holder: nn.Module, sizes: Mapping[str, int | None], site: Site) -> Any:
    """A fresh network of the holder's class, of these sizes, without a pooler, which only its own output would use."""
    cls: Any = base_class(type(holder))
    config: Any = copy.deepcopy(holder.config)
    for field, value in sizes.items():
        if value is not None:
            setattr(config, setting(config, field), value)
    if sizes.get("hidden_size") is not None and hasattr(config, "word_embed_proj_dim"):
        config.word_embed_proj_dim = config.hidden_size
    layers = size(config, "num_hidden_layers")
    if getattr(config, "layer_types", None):
        kinds = list(config.layer_types)
        config.layer_types = (kinds + kinds[-1:] * layers)[:layers]
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = min(config.max_window_layers, layers)
    heads, shared = size(config, "num_attention_heads"), getattr(config, "num_key_value_heads", None) or 1
    try:
        if heads % shared:
            raise ValueError(f"{heads} heads cannot share its {shared} heads for keys and values")
        with torch.device(site.device):
            made: Any = cls(config)
    except (ValueError, RuntimeError) as error:
        given = ", ".join(f"{field}={value}" for field, value in sizes.items() if value is not None)
        raise ConfigError(f"Shadow: there is no {cls.__name__} of {given} ({error})") from error
    if getattr(made, "pooler", None) is not None:
        made.pooler = None
    if getattr(made, "project_out", None) is not None:
        raise UnsupportedError(
            f"Shadow needs a model whose head reads what its blocks give, and {cls.__name__} projects it"
        )
    return made.train(holder.training).to(dtype=trainable_dtype(site.dtype))


def table_name(network: Any) -> str:
    """The path of a network's table of tokens."""
    table = network.get_input_embeddings()
    name: str = next(name for name, module in network.named_modules() if module is table)
    return name


def take_out_embedding(network: Any) -> str:
    """Take its table of tokens out of a network; returns the table's name there."""
    name = table_name(network)
    setattr(network.get_submodule(parent(name)), name.rpartition(".")[2], None)
    return name
