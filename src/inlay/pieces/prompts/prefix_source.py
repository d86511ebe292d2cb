"""Where the keys and values of a prefix come from: a parameter, a small MLP, or (at the start) a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.engine.piece import trainable_dtype
from inlay.engine.sites import Site
from inlay.errors import ConfigError, UnsupportedError
from inlay.pieces.prompts.saved import starting_vectors
from inlay.pieces.prompts.start import token_encoder


class Prefix(nn.Module):
    """The keys and values of one layer as they are: (n, rows), of which the first `frozen` are not trained."""

    frozen: Tensor | None

    def __init__(self, value: Tensor, frozen: int = 0) -> None:
        super().__init__()
        self.prefix = nn.Parameter(value[frozen:].clone() if frozen else value)
        self.register_buffer("frozen", value[:frozen].clone() if frozen else None)

    def forward(self) -> Tensor:
        return self.prefix if self.frozen is None else torch.cat((self.frozen, self.prefix))

    @torch.no_grad()
    def take(self, value: Tensor) -> None:
        """Become these keys and values."""
        first = 0 if self.frozen is None else len(self.frozen)
        if self.frozen is not None:
            self.frozen.copy_(value[:first])
        self.prefix.copy_(value[first:])


class Projection(nn.Module):
    """What the layers share of a reparametrised prefix: tanh(W_0 E + b_0), (n, m)."""

    def __init__(self, length: int, width: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.hidden = nn.Linear(width, size)

    def forward(self) -> Tensor:
        return torch.tanh(self.hidden(self.embedding))


class ProjectedPrefix(nn.Module):
    """W_l tanh(W_0 E + b_0) + b_l: (n, rows). One layer's source owns what is shared; a tuple hides it from the others'
    registration, so that it is saved once and stays shared when the model is copied or pickled.
    """

    def __init__(self, shared: Projection, size: int, rows: int, owns: bool) -> None:
        super().__init__()
        if owns:
            self.shared = shared
        self.behind = (shared,)
        self.out = nn.Linear(size, rows)

    def forward(self) -> Tensor:
        output: Tensor = self.out(self.behind[0]())
        return output


def prefix_sources(method: Any, model: nn.Module, sites: Sequence[Site], rows: Sequence[int]) -> list[nn.Module]:
    """What gives each layer its (n, rows) keys and values, started as `method` says."""
    dtype, device, n = trainable_dtype(sites[0].dtype), sites[0].device, method.num_virtual_tokens
    if method.projection_size is not None:
        config: Any = sites[0].module.config
        width = int(config.hidden_size)
        shared = Projection(n, width, method.projection_size)
        projected = [
            ProjectedPrefix(shared, method.projection_size, count, owns=i == 0) for i, count in enumerate(rows)
        ]
        for source in projected:
            if method.init == "zeros":
                nn.init.zeros_(source.out.weight)
                nn.init.zeros_(source.out.bias)
        return [source.to(device, dtype) for source in projected]
    if method.init_from is not None:
        start = starting_vectors(model, method.init_from, method.init_weights, (n, sum(rows)), 1, prefix=True)
        values = list(torch.split(start, list(rows), dim=-1))
    elif method.init == "text":
        values = text_prefix(model, sites, rows, n, str(method.text), method.tokenizer)
    else:
        values = [torch.zeros(n, count) if method.init == "zeros" else torch.randn(n, count) for count in rows]
    frozen = getattr(method, "num_frozen_tokens", 0)
    return [Prefix(value.to(device, dtype), frozen) for value in values]


@torch.no_grad()
def text_prefix(
    model: Any, sites: Sequence[Site], rows: Sequence[int], length: int, text: str, tokenizer: str | None
) -> list[Tensor]:
    """The keys and values that the model itself computes for `text`, layer by layer: each (n, rows)."""
    if not hasattr(model, "generate") or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"init='text' needs a decoder that caches what it read, and {type(model).__name__} is none"
        )
    ids = token_encoder(model, tokenizer, "text")(text)
    ids = (ids * -(-length // len(ids)))[:length]
    training = model.training
    cache = model.eval()(torch.tensor([ids], device=sites[0].device), use_cache=True).past_key_values
    model.train(training)
    values: list[Tensor] = []
    for site, count in zip(sites, rows, strict=True):
        layer = cache.layers[site.module.layer_idx]
        both = [one[0].transpose(0, 1).reshape(-1, one.shape[1] * one.shape[3]) for one in (layer.keys, layer.values)]
        value = torch.cat(both, dim=-1)
        if value.shape != (length, count):
            raise ConfigError(
                f"init='text': the cache of {site.path} does not hold the keys and values of all {length} tokens (it "
                "keeps a window of them, or a compressed form); use init='random'"
            )
        values.append(value.float())
    return values
