"""How a prompt starts: from nothing, from the vocabulary, from a text, or from the names of the labels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.errors import ConfigError

Init = Literal["random", "vocabulary", "text", "labels", "zeros"]
INITS = ("random", "vocabulary", "text", "labels", "zeros")


@torch.no_grad()
def initial_prompt(
    model: nn.Module,
    embedding: nn.Embedding,
    length: int,
    copies: int,
    init: Init,
    text: str | tuple[str, ...] | None,
    labels: tuple[str, ...] | None,
    tokenizer: str | None,
) -> Tensor:
    """(copies · length, d): the starting vectors. Raises ConfigError for an init that lacks what it needs."""
    if init not in INITS:
        raise ConfigError(f"init={init!r} is not a way to start a prompt; choose one of {', '.join(INITS)}")
    if init != "text" and text is not None:
        raise ConfigError(f"text={text!r} is only used with init='text', and init is {init!r}")
    if init != "labels" and labels is not None:
        raise ConfigError(f"labels={labels!r} are only used with init='labels', and init is {init!r}")
    count, weight = copies * length, embedding.weight.detach()
    if init == "zeros":
        return torch.zeros(count, embedding.embedding_dim, device=weight.device)
    if init == "random":
        return weight.float().std() * torch.randn(count, embedding.embedding_dim).to(weight.device)
    if init == "vocabulary":
        return _sample(embedding, count)
    encode = token_encoder(model, tokenizer, init)
    if init == "text":
        return torch.cat([_repeat(embedding, encode(one), length) for one in _texts(text, copies)])
    names = labels or _label_names(model)
    if len(names) > length:
        raise ConfigError(f"init='labels': {len(names)} labels do not fit into num_virtual_tokens={length}; raise it")
    means = torch.stack([_vectors(embedding, encode(name)).mean(0) for name in names])
    rest = length - len(names)
    return torch.cat([torch.cat((means, _sample(embedding, rest))) for _ in range(copies)])


def _vectors(embedding: nn.Embedding, ids: list[int]) -> Tensor:
    """Embeddings as the model computes them (some scale what their table holds)."""
    vectors: Tensor = embedding(torch.tensor([ids], device=embedding.weight.device, dtype=torch.long))
    return vectors.squeeze(0).float()


def _sample(embedding: nn.Embedding, count: int) -> Tensor:
    rows = embedding.num_embeddings
    ids = torch.cat([torch.randperm(rows) for _ in range(-(-count // rows))])[:count]
    return _vectors(embedding, ids.tolist())


def _repeat(embedding: nn.Embedding, ids: list[int], length: int) -> Tensor:
    return _vectors(embedding, (ids * -(-length // len(ids)))[:length])


def _texts(text: str | tuple[str, ...] | None, copies: int) -> tuple[str, ...]:
    texts = (text,) if isinstance(text, str) else tuple(text or ())
    if len(texts) != copies or not all(one.strip() for one in texts):
        raise ConfigError(
            f"init='text' needs {'text=, a text' if copies == 1 else f'text=, {copies} texts'}; it has {text!r}"
        )
    return texts


def _label_names(model: nn.Module) -> tuple[str, ...]:
    names = tuple(getattr(getattr(model, "config", None), "id2label", None) or {})
    texts = tuple(str(model.config.id2label[name]) for name in names)  # type: ignore[union-attr, index]
    if not texts or all(text.startswith("LABEL_") for text in texts):
        raise ConfigError("init='labels': the model's config does not name its labels; pass labels=('positive', …)")
    return texts


def token_encoder(model: nn.Module, tokenizer: str | None, init: str) -> Any:
    """Text to token ids, without special tokens."""
    name = tokenizer or getattr(model, "name_or_path", None)
    if not name:
        raise ConfigError(
            f"init={init!r} needs a tokenizer, and this model does not say where it came from: pass tokenizer="
        )
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"init={init!r} needs a tokenizer, and {name!r} has none ({error}): pass tokenizer="
        ) from error

    def encode(text: str) -> list[int]:
        ids: list[int] = found(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigError(f"init={init!r}: the tokenizer makes no tokens of {text!r}")
        return ids

    return encode
