"""Which attentions a prefix can reach, the shape of their keys and values, and what numbers their text's positions."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from inlay.engine.host import base_class
from inlay.engine.prompts.attention import INTERFACE, MARK, modelling_file
from inlay.engine.prompts.entry import arguments_of, position_tables
from inlay.errors import UnsupportedError

if TYPE_CHECKING:
    from inlay.engine.sites import Site, SiteIndex

SUPPORTED = ("eager", "sdpa")


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's forward ends in transformers' attention interface and hands on keyword arguments."""
    function = inspect.unwrap(base_class(type(module)).forward)
    takes_more = bool(function.__code__.co_flags & inspect.CO_VARKEYWORDS)
    return INTERFACE in function.__code__.co_names and takes_more and hasattr(module, "config")


def check_interface(model: nn.Module, sites: Iterable[Site], what: str) -> None:
    """Refuse, before anything is changed, attentions that a prefix would not reach."""
    whole = type(model).__name__
    files: dict[int, set[str]] = {}
    for module in model.modules():
        if hasattr(module, "config") and _calls_interface(module):
            files.setdefault(id(module.config), set()).add(modelling_file(module))
    for site in sites:
        name = type(site.module).__name__
        if not uses_interface(site.module):
            raise UnsupportedError(
                f"{what} cannot reach the attention of {whole}: {name} does not compute it through transformers' "
                "attention interface; use prompt tuning or LoRA"
            )
        config: Any = site.module.config
        kind = str(config._attn_implementation).removeprefix(MARK).partition("|")[0]
        if kind not in SUPPORTED:
            raise UnsupportedError(
                f"{what} works with {' and '.join(SUPPORTED)} attention, and {whole} uses {kind!r}: call "
                "model.set_attn_implementation('sdpa') first"
            )
        if kind == "eager" and getattr(config, "reorder_and_upcast_attn", False):
            raise UnsupportedError(f"{what}: with reorder_and_upcast_attn, eager {name} has its own path; use 'sdpa'")
        if len(files[id(config)]) > 1:
            found = ", ".join(sorted(files[id(config)]))
            raise UnsupportedError(f"{what}: one config of {whole} serves attentions of several files ({found})")


def _calls_interface(module: nn.Module) -> bool:
    function = inspect.unwrap(base_class(type(module)).forward)
    return INTERFACE in getattr(getattr(function, "__code__", None), "co_names", ())


def key_value_shape(site: Site, index: SiteIndex) -> tuple[int, int, int]:
    """(heads, size of a key, size of a value) of what an attention caches: with grouped queries, the fewer heads."""
    module: Any = site.module
    config = module.config
    if hasattr(module, "qk_head_dim") and hasattr(module, "v_head_dim"):
        return int(module.num_heads), int(module.qk_head_dim), int(module.v_head_dim)
    names = ("num_heads", "num_attention_heads", "n_heads")
    heads = next((getattr(one, name) for one in (module, config) for name in names if getattr(one, name, None)), None)
    sizes = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    size = next((getattr(one, name) for one in (module, config) for name in sizes if getattr(one, name, None)), None)
    if heads is None or (size is None and not getattr(config, "hidden_size", None)):
        raise UnsupportedError(f"cannot tell the number of heads of {site.path} ({type(module).__name__})")
    size = size or config.hidden_size // heads
    inside = [one for one in index.sites if one.path.startswith(f"{site.path}.") and one.kind == "linear"]
    keys = [one for one in inside if "key" in one.roles and not {"qkv", "kv", "query"} & one.roles]
    if keys:
        heads = keys[0].out_features // size
    elif getattr(config, "num_key_value_heads", None):
        heads = config.num_key_value_heads
    return int(heads), int(size), int(size)


def bias_source(site: Site, model: nn.Module) -> nn.Module | None:
    """The layer that computes the position biases of this attention's stack, if it has any."""
    if not hasattr(site.module, "compute_bias"):
        return None
    if getattr(site.module, "has_relative_attention_bias", False):
        return site.module
    stack = stack_of(site, model)[1]
    return next(m for m in stack.modules() if getattr(m, "has_relative_attention_bias", False) and uses_interface(m))


def stack_of(site: Site, model: nn.Module) -> tuple[str, nn.Module]:
    """The innermost transformers model around a place: it embeds the positions of the text."""
    from transformers import PreTrainedModel

    path = site.path
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, PreTrainedModel):
            return path, module
    return "", model


def position_modules(model: nn.Module, sites: Iterable[Site]) -> Iterator[tuple[str, nn.Module, int | None, int]]:
    """(path, module, positions it has, the first) of all that turns positions into vectors for these attentions."""
    stacks = dict(stack_of(site, model) for site in sites)
    for path, stack in stacks.items():
        if "input_ids" not in arguments_of(stack):  # images and sound have no positions to give way
            continue
        yield from position_tables(stack, path)
        for name, module in stack.named_modules(prefix=path):
            if "Rotary" in type(module).__name__ and "position_ids" in arguments_of(module):
                yield name, module, None, 0
