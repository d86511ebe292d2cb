"""Where a prompt sits in a model, and the pieces that put it there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.engine.host import CHILD
from inlay.engine.piece import Piece, take
from inlay.engine.prompts.calls import Combine
from inlay.engine.prompts.tasks import Tasks
from inlay.engine.prompts.virtual_tokens import Code, PromptEntry, SourceMask, VirtualTokens
from inlay.errors import UnsupportedError

if TYPE_CHECKING:
    from inlay.engine.sites import Site, SiteIndex

TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")


def prompt_sites(index: SiteIndex, what: str) -> list[Site]:
    """The places of a prompt: the model, its encoder if it is an encoder–decoder, and the token embedding that reads
    the text, in this order. Raises UnsupportedError for models that take no token ids.
    """
    model = index.model
    encoder = encoder_of(model)
    reader = model if encoder is None else encoder
    arguments, embedding = arguments_of(reader), _input_embedding(reader)
    if "input_ids" not in arguments or not isinstance(embedding, nn.Embedding):
        raise UnsupportedError(f"{what} needs a model that reads token ids, and {type(reader).__name__} does not")
    if "past_key_values" not in arguments and {"cache_params", "state", "mems"} & set(arguments):
        raise UnsupportedError(
            f"{what} cannot tell whether the recurrent state of {type(reader).__name__} holds the prompt; use LoRA"
        )
    table = embedding._parameters["weight"]
    tables = [m for m in reader.modules() if isinstance(m, nn.Embedding) and m._parameters["weight"] is table]
    places = {id(site.module): site for site in index.sites if site.parameter is None}
    return [places[id(module)] for module in (model, encoder, *tables) if module is not None]


def prompt_pieces(
    sites: Sequence[Site],
    prompt: nn.Module,
    length: int,
    copies: int = 1,
    added: bool = False,
    combine: Combine = "logits",
    tasks: Tasks | None = None,
    entry: type[PromptEntry] = PromptEntry,
) -> list[tuple[Site, Piece]]:
    """The pieces that put `prompt`, which gives (copies · length, d), into the places of `prompt_sites`.

    With `tasks` it gives (tasks · length, d), and each row of the text has the prompt of its task.
    """
    entries = [site for site in sites if not isinstance(site.module, nn.Embedding)]
    tables = [site for site in sites if isinstance(site.module, nn.Embedding)]
    others = list(_codes(tables[0].module))
    base = others[0].base if others else tables[0].in_features + 1
    place = max([1, *(other.place * other.radix for other in others)])
    code = Code(length, copies, base, place, added, 1 if tasks is None else tasks.count)
    reader = entries[-1].module
    positions, first = position_table(reader)
    inside = len(entries) > 1
    at_entry = entry(prompt, code, arguments_of(reader), positions, first, combine, inside, tasks)
    pieces: list[tuple[Site, Piece]] = [(entries[-1], at_entry)]
    pieces += [(site, VirtualTokens(prompt, code, owns=site is tables[0])) for site in tables]
    if inside:
        pieces.insert(0, (entries[0], SourceMask(code, arguments_of(entries[0].module), combine, tasks)))
    return pieces


def prompt_of(pieces: Sequence[tuple[Site, Piece]]) -> nn.Module:
    """What gives the prompt's vectors."""
    return next(piece.shared[0] for _, piece in pieces if isinstance(piece, VirtualTokens))


def peft_fields(length: int, sites: Sequence[Site], index: SiteIndex) -> dict[str, Any]:
    """The fields that HF peft's configs of prompts have in common."""
    config = getattr(index.model, "config", None)
    return {
        "num_virtual_tokens": length,
        "token_dim": sites[-1].out_features,
        "num_transformer_submodules": 1,
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
    }


def take_prompt(tensors: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """The file's prompt, without the second half that peft writes for an encoder–decoder and never uses."""
    found = tensors.get("prompt_embeddings")
    if found is not None and found.ndim == 2 and found.shape[0] == 2 * shape[0]:
        tensors["prompt_embeddings"] = found[: shape[0]]
    return take(tensors, "prompt_embeddings", shape)


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder–decoder; None for any other model."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" not in arguments_of(model):
        return None
    found = model.get_encoder()  # type: ignore[operator]
    return found if isinstance(found, nn.Module) and found is not model else None


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def position_tables(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Embedding, int, int]]:
    """(path, table, positions that fit, the first position) of every learned table of positions in a model."""
    for name, table in module.named_modules(prefix=path):
        if isinstance(table, nn.Embedding) and TABLE.search(name) and CHILD not in name.split("."):
            first = 0 if table.padding_idx is None else table.padding_idx + 1
            yield name, table, table.num_embeddings - first - int(getattr(table, "offset", 0)), first


def position_table(module: nn.Module) -> tuple[int | None, int]:
    """(positions that fit, the first position) of a model with a learned table of positions; else (None, 0)."""
    return next(((count, first) for _, _, count, first in position_tables(module)), (None, 0))


def _codes(embedding: nn.Module) -> Iterator[Code]:
    """The codes of the prompts that sit in this embedding already."""
    for module in embedding.modules():
        if isinstance(module, VirtualTokens):
            yield module.code


def _input_embedding(module: Any) -> nn.Module | None:
    try:
        found = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
