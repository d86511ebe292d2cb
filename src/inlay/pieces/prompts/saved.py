"""Prompts and prefixes as other runs have left them: read from a folder, to start another from or to compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine import files
from inlay.engine.checkpoint import own_entry
from inlay.engine.fingerprint import base_parameters, compare
from inlay.errors import CheckpointError, ConfigError

KEY = "prompt_embeddings"
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE", "prefix_tuning", "cartridge")
"""peft's names, and ours, of the methods whose file holds keys and values."""


@dataclasses.dataclass(frozen=True)
class SavedPrompt:
    """What a folder holds: prompts of n vectors (k · n, d), or a prefix (n, all layers' keys and values)."""

    folder: Path
    vectors: Tensor
    prefix: bool
    ensemble: int
    base: Mapping[str, Any]
    """The fingerprint of the model it was made for; empty in a file of peft's."""


def adapter_folder(folder: str | Path) -> Path:
    """The folder that holds the adapter: this one, or the `adapter` of the run that it is."""
    folder = Path(folder)
    inside = folder / "adapter"
    return inside if not (folder / files.CONFIG).exists() and (inside / files.CONFIG).exists() else folder


def saved_prompt(folder: str | Path) -> SavedPrompt:
    """Read the prompt of an adapter, or of a run. Raises CheckpointError when there is none, or more than one."""
    folder = adapter_folder(folder)
    config = files.read_config(folder)
    tensors, _ = files.read_tensors(folder)
    found = [key for key in tensors if key.rpartition(".")[2] == KEY]
    if len(found) != 1:
        kind = config.get("peft_type")
        raise CheckpointError(
            f"{folder} holds {len(found) or 'no'} prompt{'s' * (len(found) > 1)} (peft_type={kind!r}): name an adapter "
            "of prompt tuning, P-tuning or prefix tuning alone"
        )
    methods: Sequence[Mapping[str, Any]] = own_entry(config).get("methods") or ({},)
    number = found[0].partition(".")[0]
    method = methods[int(number)] if number.isdigit() else methods[0]
    prefix = config.get("peft_type") in PREFIXES or method.get("kind") in PREFIXES or bool(method.get("deep"))
    vectors = tensors[found[0]].float()
    if config.get("num_transformer_submodules") == 2:  # peft's file for an encoder–decoder
        if prefix:
            raise CheckpointError(f"{folder} is HF peft's prefix of an encoder–decoder: load it here and save it again")
        vectors = vectors[: len(vectors) // 2]
    base = own_entry(config).get("base") or {}
    return SavedPrompt(folder, vectors, prefix, int(method.get("ensemble", 1)), base)


def check_base(prompt: SavedPrompt, model: nn.Module) -> None:
    """Raise BaseModelError unless the prompt was made for this base; what heads the two models have does not matter."""
    if prompt.base:
        here = base_parameters(model)
        shared = {name: facts for name, facts in prompt.base["weights"].items() if name in here}
        compare({**prompt.base, "shapes": None, "weights": shared}, model)


def starting_vectors(
    model: nn.Module,
    sources: str | Sequence[str],
    weights: Sequence[float] | None,
    shape: tuple[int, int],
    copies: int,
    prefix: bool,
) -> Tensor:
    """(copies · n, d), for `shape` (n, d): one saved prompt for each copy, or the weighted mean of all for every copy.

    Raises ConfigError for prompts of another kind or shape, BaseModelError for those of another base.
    """
    folders = (sources,) if isinstance(sources, str) else tuple(sources)
    prompts = [saved_prompt(folder) for folder in folders]
    for prompt in prompts:
        check_base(prompt, model)
        n = len(prompt.vectors) // prompt.ensemble
        if prompt.prefix != prefix or (n, prompt.vectors.shape[1]) != shape:
            what = ("a prefix" if prompt.prefix else "a prompt") + f" of {n} rows of {prompt.vectors.shape[1]}"
            wanted = ("a prefix" if prefix else "a prompt") + f" of {shape[0]} rows of {shape[1]}"
            fits = prompt.prefix == prefix and prompt.vectors.shape[1] == shape[1]
            fix = f"set num_virtual_tokens={n}" if fits else "name a source of the same method, on the same base"
            raise ConfigError(f"init_from: {prompt.folder} holds {what}, and {wanted} is needed here: {fix}")
    one_each = [part for prompt in prompts for part in prompt.vectors.chunk(prompt.ensemble)]
    if copies > 1 and len(one_each) == copies and weights is None:
        return torch.cat(one_each)
    means = [prompt.vectors.view(prompt.ensemble, *shape).mean(0) for prompt in prompts]
    return mean(means, weights).repeat(copies, 1)


def mean(prompts: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    """Σ w_i p_i / Σ w_i; equal weights when there are none. Raises ConfigError for weights that cannot be used."""
    if weights is not None and (len(weights) != len(prompts) or min(weights) < 0 or sum(weights) <= 0):
        raise ConfigError(f"init_weights={tuple(weights)}: one weight of 0 or more for each of {len(prompts)} sources")
    share = torch.tensor(weights or [1.0] * len(prompts))
    return torch.einsum("s,snd->nd", share / share.sum(), torch.stack(list(prompts)))
