"""The rows of a model that stand for tokens: its tables, its decoder and their biases, and the ids in its configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inlay.errors import ConfigError, UnsupportedError

_ID = ("_token_id", "_token_index")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_NAMED = ("lang_to_id", "task_to_id")


def table_of(model: PreTrainedModel) -> nn.Embedding:
    """The table that looks input ids up. Raises UnsupportedError where there is none of plain numbers."""
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise UnsupportedError(f"{type(model).__name__} has no table of token embeddings to trim")
    if not table.weight.is_floating_point() or table.weight.device.type == "meta":
        raise UnsupportedError(
            f"the token embeddings of {type(model).__name__} hold no plain numbers: load them so first"
        )
    return table


def token_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor with a number or a row for each token, by name; tied ones come several times."""
    rows = table_of(model).num_embeddings
    owners = {id(module): module for module in _owners(model, rows)}
    weights = {id(module.weight) for module in owners.values()}
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in weights:
            found[f"{prefix}weight"] = weight
        over = id(module) in owners or any(id(inner) in owners for inner in module.modules())
        for leaf in ("bias", "final_logits_bias") if over else ():
            tensor = module._parameters.get(leaf, module._buffers.get(leaf))
            if tensor is not None and tensor.numel() == rows == tensor.shape[-1]:
                found[f"{prefix}{leaf}"] = tensor
    return found


def _owners(model: PreTrainedModel, rows: int) -> Iterator[Any]:
    """The modules that a model, or one inside it, names as its table or its decoder."""
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel):
            for getter in (inner.get_input_embeddings, inner.get_output_embeddings):
                try:
                    module = getter()
                except (NotImplementedError, AttributeError):
                    continue
                if isinstance(module, nn.Embedding | nn.Linear) and module.weight.shape[0] == rows:
                    yield module


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Every config in the model, the generation config among them."""
    found: dict[int, Any] = {}

    def take(config: Any) -> None:
        if hasattr(config, "to_dict") and id(config) not in found:
            found[id(config)] = config
            for value in vars(config).values():
                take(value)

    for module in model.modules():
        take(getattr(module, "config", None))
        take(getattr(module, "generation_config", None))
    return list(found.values())


def ids_in(configs: Sequence[Any], rows: int) -> dict[str, set[int]]:
    """The tokens that configs name one by one, by the name they give them; ids outside of the table are no tokens."""
    found: dict[str, set[int]] = {}
    for config in configs:
        for name, value in vars(config).items():
            named = _flat(value) if name.endswith(_ID) or name == "force_words_ids" else []
            if name == "forced_decoder_ids" and value:  # pairs of a position and a token
                named = _flat([row for _, row in value])
            if named:
                ids = {row for row in named if 0 <= row < rows}
                found.setdefault(name, set()).update(ids)
    return {name: ids for name, ids in found.items() if ids}


def _flat(value: Any) -> list[int]:
    if isinstance(value, list | tuple):
        return [row for entry in value for row in _flat(entry)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def counted_from(model: PreTrainedModel) -> int | None:
    """The padding token's id where positions are counted from it, as RoBERTa does: then it must not move."""
    tables = {id(module) for module in _owners(model, table_of(model).num_embeddings)}
    others = (module for module in model.modules() if not isinstance(module, PreTrainedModel))
    found: list[Any] = [getattr(module, "padding_idx", None) for module in others if id(module) not in tables]
    return max((row for row in found if isinstance(row, int)), default=None)


def keep_rows(model: PreTrainedModel, rows: Mapping[int, int]) -> None:
    """Cut every token tensor to these rows, {old id: new id}, ties kept; configs say the new size and ids."""
    before = table_of(model).num_embeddings
    tensors = token_tensors(model)
    index = torch.tensor(sorted(rows, key=rows.__getitem__))
    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in made:
            cut = tensor.detach().index_select(0 if tensor.shape[0] == before else -1, index.to(tensor.device))
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(cut, requires_grad=tensor.requires_grad) if parameter else cut
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        setattr(module, leaf, made[id(tensor)])
        if leaf == "weight" and isinstance(module, nn.Embedding) and module.num_embeddings == before:
            module.num_embeddings = len(rows)
            module.padding_idx = None if module.padding_idx is None else rows.get(module.padding_idx)
        elif leaf == "weight" and isinstance(module, nn.Linear):
            module.out_features = len(rows)
    for inner in model.modules():
        pad: Any = getattr(inner, "padding_idx", None)
        if isinstance(inner, PreTrainedModel) and isinstance(pad, int):
            inner.padding_idx = rows.get(pad, pad)  # type: ignore[assignment]
    for config in configs_of(model):
        _renumber(config, rows, before)


def _renumber(config: Any, rows: Mapping[int, int], before: int) -> None:
    for name, value in list(vars(config).items()):
        if name.endswith("vocab_size") and value == before:
            setattr(config, name, len(rows))
        elif name.endswith(_ID) and value is not None:
            moved = [rows.get(row, row) for row in _flat(value)]
            if moved:
                setattr(config, name, moved if isinstance(value, list | tuple) else moved[0])
        elif name in _LISTS and value:
            setattr(config, name, [rows[row] for row in value if row in rows])
        elif name == "bad_words_ids" and value:
            setattr(config, name, [[rows[r] for r in word] for word in value if all(r in rows for r in word)] or None)
        elif name == "forced_decoder_ids" and value:
            setattr(config, name, [[at, rows.get(row, row)] for at, row in value])
        elif name == "force_words_ids" and value:
            setattr(config, name, _moved(value, rows))
        elif name == "sequence_bias" and value:
            pairs = [(word, bias) for word, bias in (value.items() if isinstance(value, Mapping) else value)]
            kept = [[_moved(word, rows), bias] for word, bias in pairs if all(row in rows for row in word)]
            setattr(config, name, kept or None)
        elif name in _NAMED and value:
            setattr(config, name, {key: rows[row] for key, row in value.items() if row in rows})


def _moved(value: Any, rows: Mapping[int, int]) -> Any:
    return [_moved(entry, rows) for entry in value] if isinstance(value, list | tuple) else rows.get(value, value)


def check_ids(named: Mapping[str, set[int]], tokens: set[int]) -> None:
    """Raise ConfigError where the model's config names a token that the tokenizer does not have."""
    for name, ids in named.items():
        if ids - tokens:
            raise ConfigError(
                f"the model's config says {name}={min(ids - tokens)}, which is no token of this tokenizer: give the "
                "tokenizer that belongs to the model, or mend the config"
            )
